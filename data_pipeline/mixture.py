"""Which source each training sample comes from: a pure function of the sample's number, in memory that does not grow.

Sample i of a run is number j of its source: j // N is the source's epoch, and the order of that epoch (:mod:`data_pipeline.order`) says which of
its N samples it is. So every source passes through its own epochs, each sample once in each, whatever its share of the mixture is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from pretrain.config.data_schema import Mixture, Proportional, Temperature, TokenBudget, Weights
from pretrain.config.errors import ConfigError, DataError

# Shares are rounded to this many parts, and tables are made for about this many samples at a time.
BLOCK = 65_536


class Interleaving:
    """A sequence of slots with counts[s] of them for source s, spread evenly, and then the same again.

    Slot number k of a source with n slots has its place at (k + 0.5) / n; all slots are sorted by their places, equal ones by source. So any
    first part of the sequence holds each source's share of it to within about one slot. The order is made block by block.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = [int(count) for count in counts]
        self.total = sum(self.counts)
        self._blocks = -(-self.total // BLOCK)
        self._table = lru_cache(maxsize=2)(self._make_table)

    def slots(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The source and the running number in it of slots first .. first + count - 1: two int64 [count]."""
        sources, numbers = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            period, inside = divmod(first + filled, self.total)
            start, owners, places = self._table(self._block_of(inside))
            here = slice(inside - start, inside - start + count - filled)
            taken = len(owners[here])
            sources[filled : filled + taken] = owners[here]
            numbers[filled : filled + taken] = places[here] + period * np.array(self.counts)[owners[here]]
            filled += taken
        return sources, numbers

    def counts_before(self, slot: int) -> list[int]:
        """How many slots each source has before this one."""
        period, inside = divmod(slot, self.total)
        block = self._block_of(inside)
        start, owners, _ = self._table(block)
        within = np.bincount(owners[: inside - start], minlength=len(self.counts)).tolist()
        return [period * count + before + more for count, before, more in zip(self.counts, self._before(block), within, strict=True)]

    def slot_of(self, source: int, number: int) -> int:
        """The slot of a source's running number."""
        period, within = divmod(number, self.counts[source])
        block = (2 * within + 1) * self._blocks // (2 * self.counts[source])
        start, owners, places = self._table(block)
        return period * self.total + start + int(np.flatnonzero((owners == source) & (places == within))[0])

    def _before(self, block: int) -> list[int]:
        """How many slots of each source lie in the blocks before: those with (k + 0.5) / n below block / blocks, in whole numbers."""
        return [-(-(2 * block * count - self._blocks) // (2 * self._blocks)) if count else 0 for count in self.counts]

    def _block_of(self, inside: int) -> int:
        block = inside * self._blocks // self.total
        while sum(self._before(block)) > inside:
            block -= 1
        while sum(self._before(block + 1)) <= inside:
            block += 1
        return block

    def _make_table(self, block: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The block's first slot, and the source and number of each of its slots."""
        before, after = self._before(block), self._before(block + 1)
        owners = np.repeat(np.arange(len(self.counts)), np.subtract(after, before))
        numbers = np.concatenate([np.arange(low, high, dtype=np.int64) for low, high in zip(before, after, strict=True)])
        order = np.argsort((numbers + 0.5) / np.array(self.counts)[owners], kind="stable")
        return sum(before), owners[order], numbers[order]


def quantize(weights: Sequence[float], parts: int = BLOCK) -> list[int]:
    """Whole numbers in proportion to weights that add up to ``parts``, by the largest remainder; above zero stays above zero."""
    ideal = [weight * parts / sum(weights) for weight in weights]
    counts = [max(int(share), 1) if share > 0 else 0 for share in ideal]
    while (missing := parts - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        # Below, one part is the least that a source keeps.
        eligible = [i for i, count in enumerate(counts) if ideal[i] > 0 and count + step >= 1]
        for i in sorted(eligible, key=lambda i: step * (counts[i] - ideal[i]))[: abs(missing)]:
            counts[i] += step
    return counts


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
class Plan:
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
        return {"start_sample": self.start_sample, "mixture": mixture, "sources": sources, "sequence_length": self.sequence_length}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Plan:
        mixture: Mixture = TypeAdapter(Mixture).validate_python(content["mixture"])
        sources = {name: SourceState(**source) for name, source in content["sources"].items()}
        return cls(content["start_sample"], mixture, sources, content["sequence_length"])

    def limit(self, name: str) -> int | None:
        """Samples that the run may take of a source; None without a limit."""
        epochs = self.mixture.max_epochs.get(name)
        return None if epochs is None else int(epochs * self.sources[name].num_samples)

    def counts(self, active: Sequence[str]) -> list[int]:
        """Slots of each active source, in proportion to their shares."""
        sources = [self.sources[name] for name in active]
        match self.mixture:
            case Weights(weights=weights):
                return _quantized([weights[name] for name in active])
            case Temperature(temperature=temperature):
                return _quantized([source.num_samples ** (1 / temperature) for source in sources])
            case TokenBudget(tokens=tokens):
                wanted = [-(-tokens[name] // self.sequence_length) for name in active]
                missing = [max(samples - source.taken, 0) for samples, source in zip(wanted, sources, strict=True)]
                return missing if any(missing) else wanted
            case Proportional():
                return [source.num_samples for source in sources]


def _quantized(weights: list[float]) -> list[int]:
    return quantize(weights) if any(weights) else [0] * len(weights)


@dataclass(frozen=True)
class Phase:
    """A stretch of samples with the same shares: from ``start_sample`` until the next phase, or until a source is exhausted."""

    start_sample: int
    names: list[str]
    interleaving: Interleaving
    taken: list[int]

    def taken_before(self, sample: int) -> dict[str, int]:
        counts = self.interleaving.counts_before(sample - self.start_sample)
        return {name: before + count for name, before, count in zip(self.names, self.taken, counts, strict=True)}


class Schedule:
    """The sources of all samples of a run.

    Attributes:
        num_samples: where every source is exhausted; None where at least one never is.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = list(plans)
        self.num_samples: int | None = None
        stops = [*(plan.start_sample for plan in self.plans[1:]), None]
        self._phases_of_plan = [self._expand(plan, stop) for plan, stop in zip(self.plans, stops, strict=True)]
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
            end = min(first + count, self._starts[number + 1]) if number + 1 < len(self.phases) else first + count
            owners, numbers = phase.interleaving.slots(start - phase.start_sample, end - start)
            for source in np.unique(owners).tolist():
                places = np.flatnonzero(owners == source)
                found.append((phase.names[source], places + (start - first), numbers[places] + phase.taken[source]))
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
                    result |= phase.taken_before(min(end, following.start_sample) if following else end)
        return result

    def _expand(self, plan: Plan, stop: int | None) -> list[Phase]:
        """The phases of a plan: a new one begins where a source is exhausted."""
        start, taken = plan.start_sample, {name: source.taken for name, source in plan.sources.items()}
        phases: list[Phase] = []
        while stop is None or start < stop:
            active = [name for name in plan.sources if (limit := plan.limit(name)) is None or taken[name] < limit]
            counts = plan.counts(active)
            if not any(counts):
                self.num_samples = start
                break
            phase = Phase(start, active, Interleaving(counts), [taken[name] for name in active])
            phases.append(phase)
            limits = [plan.limit(name) for name in active]
            ends = [
                phase.interleaving.slot_of(source, limit - before - 1) + 1
                for source, (limit, before) in enumerate(zip(limits, phase.taken, strict=True))
                if limit is not None and counts[source]
            ]
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
    given = mixture.weights if isinstance(mixture, Weights) else mixture.tokens if isinstance(mixture, TokenBudget) else None
    field = "weights" if isinstance(mixture, Weights) else "tokens"
    for part, names in ((field, list(given or {})), ("max_epochs", list(mixture.max_epochs))):
        for name in names:
            if name not in sources:
                near = get_close_matches(name, sources, n=2)
                hint = "did you mean " + " or ".join(f"'{other}'" for other in near) + "?" if near else f"the data has {', '.join(sources)}"
                raise ConfigError(f"{where}.{part} names '{name}', which is no source of the data: {hint}")
    if given is None:
        return
    for name in sources:
        if name not in given:
            raise ConfigError(f"{where}.{field} does not name the source '{name}': give it a number, or 0 to leave it out")
    if not any(given.values()):
        raise ConfigError(f"{where}.{field} is 0 for every source: give at least one a larger number")
