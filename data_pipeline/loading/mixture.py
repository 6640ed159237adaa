"""Assigns a source to each training sample, as a pure function in constant memory.

Sample i of a run is sample j of its source: j // N is the source's epoch, and the order of that
epoch (:mod:`data_pipeline.loading.shuffle`) says which of its N samples it is. So every source
passes through its own epochs, each sample once in each, whatever its share of the mixture. Shares
are exact: a weight is the decimal number that was written, and
:mod:`data_pipeline.loading.interleaving` accumulates no rounding errors.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from fractions import Fraction
from itertools import zip_longest
from typing import Annotated

import numpy as np
from pydantic import Field

from data_pipeline.config import Mixture, Proportional, Temperature, TokenBudget, Weights
from data_pipeline.loading.interleaving import Interleaving
from data_pipeline.loading.saved import read_saved
from pretrain.core.errors import CheckpointError, ConfigError, DataError
from pretrain.core.files import JsonObject
from pretrain.core.saved_types import Count

# Version of the interleaving of samples: a checkpoint's plans count samples by it.
VERSION = 2


@dataclass(frozen=True)
class SourceState:
    """A source at the start of a mixture entry.

    Attributes:
        fingerprint: of its data.
        num_samples: of one epoch.
        taken: samples that the run has taken from it before.
    """

    fingerprint: str
    num_samples: Annotated[Count, Field(ge=1)]
    taken: Count = 0


@dataclass(frozen=True)
class MixtureEntry:
    """A mixture that holds from a sample on, until the next entry.

    Checkpoints store a run's entries.

    Attributes:
        sequence_length: tokens of a sample.
    """

    start_sample: Count
    mixture: Mixture
    sources: Annotated[dict[str, SourceState], Field(min_length=1)]
    sequence_length: Annotated[Count, Field(ge=1)]

    def to_dict(self) -> JsonObject:
        """The entry as JSON."""
        return {
            "version": VERSION,
            "start_sample": self.start_sample,
            "mixture": self.mixture.model_dump(mode="json"),
            "sources": {name: asdict(source) for name, source in self.sources.items()},
            "sequence_length": self.sequence_length,
        }

    @classmethod
    def from_dict(cls, content: JsonObject) -> MixtureEntry:
        """The entry that :meth:`to_dict` wrote.

        Raises:
            CheckpointError: if it is none.
            DataError: if an earlier version wrote it, which interleaved several sources in another
                order.
        """
        if content.get("version") != VERSION and len(content.get("sources", ())) > 1:
            raise DataError(
                "an earlier version of this program, which mixed sources in another order, wrote "
                "the checkpoint: what it has read is not known here; resume with that version, or "
                "start a new run from its weights with initial_weights"
            )
        entry = read_saved(cls, {name: part for name, part in content.items() if name != "version"})
        try:
            check_names(entry.mixture, list(entry.sources), "mixture")
        except ConfigError as error:
            raise CheckpointError(
                f"the checkpoint's position in the data is damaged: {error}"
            ) from None
        return entry

    def limit(self, name: str) -> int | None:
        """Samples that the run may take from a source; None without a limit."""
        epochs = self.mixture.max_epochs.get(name)
        if epochs is None:
            return None
        return int(Fraction(repr(epochs)) * self.sources[name].num_samples)

    def shares(self, active: Sequence[str]) -> list[Fraction]:
        """The share of each active source; they need not add up to 1."""
        sources = [self.sources[name] for name in active]
        match self.mixture:
            case Weights(weights=weights):
                return exact_weights([weights[name] for name in active])
            case Temperature(temperature=temperature):
                # Relative to the largest source: a small temperature would overflow a float.
                largest = max((source.num_samples for source in sources), default=1)
                return [
                    Fraction((source.num_samples / largest) ** (1 / temperature))
                    for source in sources
                ]
            case TokenBudget(tokens=tokens):
                wanted = [-(-tokens[name] // self.sequence_length) for name in active]
                missing = [
                    max(samples - source.taken, 0)
                    for samples, source in zip(wanted, sources, strict=True)
                ]
                return [Fraction(samples) for samples in (missing if any(missing) else wanted)]
            case Proportional():
                return [Fraction(source.num_samples) for source in sources]


def exact_weights(weights: Sequence[float]) -> list[Fraction]:
    """The decimal numbers that were written: 0.1 is a tenth, not the nearest binary fraction."""
    return [Fraction(repr(weight)) for weight in weights]


@dataclass(frozen=True)
class MixtureSegment:
    """Samples with the same shares.

    A segment lasts from ``start_sample`` until the next entry, or until a source is exhausted.
    """

    start_sample: int
    names: list[str]
    interleaving: Interleaving
    taken: list[int]

    def taken_before(self, sample: int) -> dict[str, int]:
        """Samples of each source before ``sample``, those before the segment included."""
        counts = self.interleaving.counts_before(sample - self.start_sample)
        return {
            name: before + count
            for name, before, count in zip(self.names, self.taken, counts, strict=True)
        }


class MixtureSchedule:
    """The sources of all samples of a run.

    Attributes:
        entries: the mixtures, in the order of their start.
        segments: of all entries.
        num_samples: after which every source is exhausted; None if at least one never is.
    """

    def __init__(self, entries: Sequence[MixtureEntry]) -> None:
        self.entries = list(entries)
        self.num_samples: int | None = None
        stops = [*(entry.start_sample for entry in self.entries[1:]), None]
        self._segments_of_entry = [
            self._expand(entry, stop) for entry, stop in zip(self.entries, stops, strict=True)
        ]
        self.segments = [segment for found in self._segments_of_entry for segment in found]
        self._starts = [segment.start_sample for segment in self.segments]

    def samples(self, first: int, count: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Samples first .. first + count - 1, grouped by segment and source.

        Returns:
            For each group the source's name, the places of its samples in this range, and their
            running indices in the source.

        Raises:
            DataError: if every source is exhausted before.
        """
        if self.num_samples is not None and first + count > self.num_samples:
            raise DataError(
                f"data.mixture.max_epochs allows {self.num_samples} samples of "
                f"{self.entries[-1].sequence_length} tokens, and the run needs more: raise it, add "
                "data, or lower train.train_tokens"
            )
        found: list[tuple[str, np.ndarray, np.ndarray]] = []
        start = first
        while start < first + count:
            number = bisect_right(self._starts, start) - 1
            segment = self.segments[number]
            end = first + count
            if number + 1 < len(self.segments):
                end = min(end, self._starts[number + 1])
            owners, numbers = segment.interleaving.slots(start - segment.start_sample, end - start)
            for source in np.unique(owners).tolist():
                places = np.flatnonzero(owners == source)
                indices = numbers[places] + segment.taken[source]
                found.append((segment.names[source], places + (start - first), indices))
            start = end
        return found

    def taken(self, sample: int) -> dict[str, int]:
        """Samples of each source before ``sample``, including sources no longer used."""
        result: dict[str, int] = {}
        ends = [*(min(entry.start_sample, sample) for entry in self.entries[1:]), sample]
        for entry, segments, end in zip(self.entries, self._segments_of_entry, ends, strict=True):
            if entry.start_sample > sample:
                break
            result |= {name: source.taken for name, source in entry.sources.items()}
            for segment, following in zip_longest(segments, segments[1:]):
                if segment.start_sample < end:
                    stop = min(end, following.start_sample) if following else end
                    result |= segment.taken_before(stop)
        return result

    def _expand(self, entry: MixtureEntry, stop: int | None) -> list[MixtureSegment]:
        """The segments of an entry: a new one begins whenever a source is exhausted."""
        start = entry.start_sample
        taken = {name: source.taken for name, source in entry.sources.items()}
        segments: list[MixtureSegment] = []
        while stop is None or start < stop:
            active = [
                name
                for name in entry.sources
                if (limit := entry.limit(name)) is None or taken[name] < limit
            ]
            shares = entry.shares(active)
            if not any(shares):
                self.num_samples = start
                break
            segment = MixtureSegment(
                start, active, Interleaving(shares), [taken[name] for name in active]
            )
            segments.append(segment)
            limits = [entry.limit(name) for name in active]
            lasts = [
                segment.interleaving.slot_of(source, limit - before - 1)
                for source, (limit, before) in enumerate(zip(limits, segment.taken, strict=True))
                if limit is not None and shares[source]
            ]
            ends = [last + 1 for last in lasts if last is not None]
            if not ends:
                break
            start += min(ends)
            taken |= segment.taken_before(start)
        return segments


def check_names(mixture: Mixture, sources: Sequence[str], key: str = "data.mixture") -> None:
    """Check that a mixture fits the sources that the data has.

    Args:
        key: the recipe's field, for error sentences.

    Raises:
        ConfigError: for a name that no source has, a source without a weight, or weights that are
            all zero.
    """
    field = "weights"
    given: Mapping[str, float] | None = None
    if isinstance(mixture, Weights):
        given = mixture.weights
    elif isinstance(mixture, TokenBudget):
        field = "tokens"
        given = mixture.tokens
    for name in given or {}:
        _check_known(name, sources, f"{key}.{field}")
    for name in mixture.max_epochs:
        _check_known(name, sources, f"{key}.max_epochs")
    if given is None:
        return
    for name in sources:
        if name not in given:
            raise ConfigError(
                f"{key}.{field} does not name the source '{name}': give it a number, or 0 to leave "
                "it out"
            )
    if not any(given.values()):
        raise ConfigError(f"{key}.{field} is 0 for every source: give at least one a larger number")


def _check_known(name: str, sources: Sequence[str], key: str) -> None:
    if name in sources:
        return
    hint = f"the data has {', '.join(sources)}"
    if near := get_close_matches(name, sources, n=2):
        hint = "did you mean " + " or ".join(f"'{other}'" for other in near) + "?"
    raise ConfigError(f"{key} names '{name}', which is no source of the data: {hint}")
