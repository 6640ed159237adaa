"""Which source each training sample comes from: a pure function of the sample's number, in memory that does not grow.

Sample i of a run is number j of its source: j // N is the source's epoch, and the order of that epoch (:mod:`data_pipeline.loading.shuffle`) says which of
its N samples it is. So every source passes through its own epochs, each sample once in each, whatever its share of the mixture is. Shares are exact:
a weight is the decimal number that was written, and :mod:`data_pipeline.loading.interleaving` rounds nothing that adds up.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from fractions import Fraction
from itertools import zip_longest
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from data_pipeline.config import Mixture, Proportional, Temperature, TokenBudget, Weights
from data_pipeline.loading.interleaving import Interleaving
from pretrain.core.errors import ConfigError, DataError

# Of how samples are dealt out: a checkpoint's plans count samples by it.
VERSION = 2


@dataclass(frozen=True)
class SourceState:
    """A source as a plan finds it.

    Attributes:
        fingerprint: of its data.
        num_samples: of one epoch.
        taken: samples that the run has taken of it before.
    """

    fingerprint: str
    num_samples: int
    taken: int = 0


@dataclass(frozen=True)
class MixtureEntry:
    """A mixture that holds from a sample on, until the next one. Checkpoints carry the plans of their run.

    Attributes:
        sequence_length: tokens of a sample.
    """

    start_sample: int
    mixture: Mixture
    sources: dict[str, SourceState]
    sequence_length: int

    def to_dict(self) -> dict[str, Any]:
        sources = {name: asdict(source) for name, source in self.sources.items()}
        mixture = self.mixture.model_dump(mode="json")
        return {
            "version": VERSION,
            "start_sample": self.start_sample,
            "mixture": mixture,
            "sources": sources,
            "sequence_length": self.sequence_length,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> MixtureEntry:
        """The plan that :meth:`to_dict` wrote.

        Raises:
            DataError: if an earlier version wrote it, which dealt out the samples of several sources in another order.
        """
        if content.get("version") != VERSION and len(content["sources"]) > 1:
            raise DataError(
                "an earlier version of this program, which mixed sources in another order, wrote the checkpoint: what it has read is not known here; "
                "resume with that version, or start a new run from its weights with initial_weights"
            )
        mixture: Mixture = TypeAdapter(Mixture).validate_python(content["mixture"])
        sources = {name: SourceState(**source) for name, source in content["sources"].items()}
        return cls(content["start_sample"], mixture, sources, content["sequence_length"])

    def limit(self, name: str) -> int | None:
        """Samples that the run may take of a source; None without a limit."""
        epochs = self.mixture.max_epochs.get(name)
        return (
            None if epochs is None else int(Fraction(repr(epochs)) * self.sources[name].num_samples)
        )

    def shares(self, active: Sequence[str]) -> list[Fraction]:
        """The share of each active source, in numbers that need not add up to 1."""
        sources = [self.sources[name] for name in active]
        match self.mixture:
            case Weights(weights=weights):
                return exact_weights([weights[name] for name in active])
            case Temperature(temperature=temperature):
                # Relative to the largest, so that no power is too large for a float.
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
    """The decimal numbers that were written: 0.1 is a tenth, and not the nearest binary fraction."""
    return [Fraction(repr(weight)) for weight in weights]


@dataclass(frozen=True)
class MixtureSegment:
    """A stretch of samples with the same shares: from ``start_sample`` until the next phase, or until a source is exhausted."""

    start_sample: int
    names: list[str]
    interleaving: Interleaving
    taken: list[int]

    def taken_before(self, sample: int) -> dict[str, int]:
        counts = self.interleaving.counts_before(sample - self.start_sample)
        return {
            name: before + count
            for name, before, count in zip(self.names, self.taken, counts, strict=True)
        }


class MixtureSchedule:
    """The sources of all samples of a run.

    Attributes:
        num_samples: where every source is exhausted; None where at least one never is.
    """

    def __init__(self, plans: Sequence[MixtureEntry]) -> None:
        self.plans = list(plans)
        self.num_samples: int | None = None
        stops = [*(plan.start_sample for plan in self.plans[1:]), None]
        self._phases_of_plan = [
            self._expand(plan, stop) for plan, stop in zip(self.plans, stops, strict=True)
        ]
        self.phases = [phase for phases in self._phases_of_plan for phase in phases]
        self._starts = [phase.start_sample for phase in self.phases]

    def samples(self, first: int, count: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Samples first .. first + count - 1 by source: (its name, where in this range its samples stand, their running numbers in it).

        Raises:
            DataError: where every source is exhausted before.
        """
        if self.num_samples is not None and first + count > self.num_samples:
            raise DataError(
                f"data.mixture.max_epochs allows {self.num_samples} samples of {self.plans[-1].sequence_length} tokens, and the run needs more: "
                "raise it, add data, or lower train.train_tokens"
            )
        found: list[tuple[str, np.ndarray, np.ndarray]] = []
        start = first
        while start < first + count:
            number = bisect_right(self._starts, start) - 1
            phase = self.phases[number]
            end = (
                min(first + count, self._starts[number + 1])
                if number + 1 < len(self.phases)
                else first + count
            )
            owners, numbers = phase.interleaving.slots(start - phase.start_sample, end - start)
            for source in np.unique(owners).tolist():
                places = np.flatnonzero(owners == source)
                found.append(
                    (
                        phase.names[source],
                        places + (start - first),
                        numbers[places] + phase.taken[source],
                    )
                )
            start = end
        return found

    def taken(self, sample: int) -> dict[str, int]:
        """How many samples of each source stand before this one, of those too that the run no longer uses."""
        result: dict[str, int] = {}
        ends = [*(min(plan.start_sample, sample) for plan in self.plans[1:]), sample]
        for plan, phases, end in zip(self.plans, self._phases_of_plan, ends, strict=True):
            if plan.start_sample > sample:
                break
            result |= {name: source.taken for name, source in plan.sources.items()}
            for phase, following in zip_longest(phases, phases[1:]):
                if phase.start_sample < end:
                    result |= phase.taken_before(
                        min(end, following.start_sample) if following else end
                    )
        return result

    def _expand(self, plan: MixtureEntry, stop: int | None) -> list[MixtureSegment]:
        """The phases of a plan: a new one begins where a source is exhausted."""
        start, taken = (
            plan.start_sample,
            {name: source.taken for name, source in plan.sources.items()},
        )
        phases: list[MixtureSegment] = []
        while stop is None or start < stop:
            active = [
                name
                for name in plan.sources
                if (limit := plan.limit(name)) is None or taken[name] < limit
            ]
            shares = plan.shares(active)
            if not any(shares):
                self.num_samples = start
                break
            phase = MixtureSegment(
                start, active, Interleaving(shares), [taken[name] for name in active]
            )
            phases.append(phase)
            limits = [plan.limit(name) for name in active]
            lasts = [
                phase.interleaving.slot_of(source, limit - before - 1)
                for source, (limit, before) in enumerate(zip(limits, phase.taken, strict=True))
                if limit is not None and shares[source]
            ]
            ends = [last + 1 for last in lasts if last is not None]
            if not ends:
                break
            start += min(ends)
            taken |= phase.taken_before(start)
        return phases


def check_names(mixture: Mixture, sources: Sequence[str], where: str = "data.mixture") -> None:
    """Whether a mixture fits the sources that the data has.

    Args:
        where: the recipe's field, for sentences.

    Raises:
        ConfigError: for a name that no source has, a source without a weight, or weights that are all zero.
    """
    given = (
        mixture.weights
        if isinstance(mixture, Weights)
        else mixture.tokens
        if isinstance(mixture, TokenBudget)
        else None
    )
    field = "weights" if isinstance(mixture, Weights) else "tokens"
    for part, names in ((field, list(given or {})), ("max_epochs", list(mixture.max_epochs))):
        for name in names:
            if name not in sources:
                near = get_close_matches(name, sources, n=2)
                hint = (
                    "did you mean " + " or ".join(f"'{other}'" for other in near) + "?"
                    if near
                    else f"the data has {', '.join(sources)}"
                )
                raise ConfigError(
                    f"{where}.{part} names '{name}', which is no source of the data: {hint}"
                )
    if given is None:
        return
    for name in sources:
        if name not in given:
            raise ConfigError(
                f"{where}.{field} does not name the source '{name}': give it a number, or 0 to leave it out"
            )
    if not any(given.values()):
        raise ConfigError(
            f"{where}.{field} is 0 for every source: give at least one a larger number"
        )
