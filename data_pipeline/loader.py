"""From shards to batches, in an order that depends on nothing but the recipe and the step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_pipeline.batch import Batch, Origin, Sample, Samples, to_batch
from data_pipeline.corpora import Corpora
from data_pipeline.manifest import canonical_sha256
from data_pipeline.mixture import Plan, Schedule, SourceState, check_names
from data_pipeline.order import shuffled
from data_pipeline.packing import PADDING_WINDOW, Windows, training_samples
from data_pipeline.waiting import Waiting
from pretrain.config.data_schema import Mixture
from pretrain.config.errors import ConfigError, DataError
from pretrain.config.schema import Recipe

# Read ahead of the step that is asked for, so that a slow disk has to be slow for as long before training waits.
STEPS_AHEAD = 3


class Loader(Protocol):
    """One rank's training batches.

    Attributes:
        waiting: how long training has waited for batches.
    """

    dp_rank: int
    dp_size: int
    micro_batch_size: int
    waiting: Waiting

    def step_batches(self, step: int) -> list[Batch]:
        """This rank's micro batches of a step (from 0), one for each gradient accumulation step."""

    def require(self, num_steps: int) -> None:
        """Whether there is data for so many steps.

        Raises:
            DataError: where there is not.
        """

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after ``step`` steps has to carry, as JSON."""

    def resume(self, state: dict[str, Any], step: int) -> None:
        """Goes on after ``step`` steps from what a checkpoint carries."""

    def pass_over(self, step: int, num_steps: int) -> None:
        """Gives step ``step``, which comes next, and all later ones the samples that stand ``num_steps`` steps further on."""

    def origins(self, step: int) -> list[Origin]:
        """Where each sequence of a step that was read comes from, over all ranks; empty where that is no longer known."""


@dataclass(frozen=True)
class TrainingSource:
    """A source of the mixture: its samples, and the fingerprint of the data that they are made of."""

    samples: Samples
    fingerprint: str


class TrainLoader:
    """One rank's training batches, a pure function of the step: to resume, ask for the next step.

    Micro batch number j of a step holds its samples j * micro_batch_size onwards, and goes to rank j % dp_size. So with a fixed micro batch
    size the step's micro batches are the same for any number of ranks; they only lie on other ones. A background thread reads ahead.

    Args:
        sources: by name.
        mixture: their shares.
        seed: of the sample order.
        global_batch_size, micro_batch_size: in sequences.
        dp_rank, dp_size: this rank's number among the data-parallel ranks, and how many there are.

    Raises:
        ConfigError: where the micro batches do not divide evenly among the ranks, or the mixture names other sources.
        DataError: where the data has fewer samples than one step needs, or a source has none.
    """

    def __init__(
        self,
        sources: Mapping[str, TrainingSource],
        mixture: Mixture,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        check_micro_batches(global_batch_size, micro_batch_size, dp_size)
        check_names(mixture, list(sources))
        self.sources, self.mixture, self.seed = dict(sources), mixture, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.sequence_length = next(iter(sources.values())).samples.sequence_length
        self._check_size()
        self.schedule = Schedule([self._plan(0, {})], self.sequence_length)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="train-loader")
        self._ahead: deque[tuple[int, Future[list[Batch]]]] = deque()
        self.waiting = Waiting()
        self.samples_passed_over = 0

    def first_sample(self, step: int) -> int:
        """The number in the schedule of the first sample of a step."""
        return step * self.global_batch_size + self.samples_passed_over

    def sample_numbers(self, step: int) -> list[tuple[str, int]]:
        """The source and the sample in it of each sequence of the whole step, over all ranks."""
        found: list[tuple[str, int]] = [("", 0)] * self.global_batch_size
        for name, places, numbers in self.schedule.samples(self.first_sample(step), self.global_batch_size):
            samples = shuffled(numbers, len(self.sources[name].samples), self.seed)
            for place, sample in zip(places.tolist(), samples.tolist(), strict=True):
                found[place] = (name, sample)
        return found

    def step_batches(self, step: int) -> list[Batch]:
        """This rank's micro batches of a step (from 0), one for each gradient accumulation step."""
        if not self._ahead or self._ahead[0][0] != step:
            self._ahead.clear()
        while len(self._ahead) <= STEPS_AHEAD:
            ahead = step + len(self._ahead)
            self._ahead.append((ahead, self._reader.submit(self._read, ahead)))
        return self.waiting.result(self._ahead.popleft()[1])

    def pass_over(self, step: int, num_steps: int) -> None:
        """Gives step ``step`` and all later ones the samples that stand ``num_steps`` steps further on."""
        self.samples_passed_over += num_steps * self.global_batch_size
        self._ahead.clear()

    def origins(self, step: int) -> list[Origin]:
        """Where each sequence of a step comes from, over all ranks."""
        return [Origin(name, self.sources[name].samples.documents(sample)) for name, sample in self.sample_numbers(step)]

    def state(self, step: int) -> dict[str, Any]:
        """The mixtures of the run so far, and how many samples it has passed over: with the step they say which samples it has taken."""
        return {"plans": [plan.to_dict() for plan in self.schedule.plans], "samples_passed_over": self.samples_passed_over}

    def resume(self, state: dict[str, Any], step: int) -> None:
        """Goes on after ``step`` steps. Where the mixture or its sources have changed, the new ones hold from here on, and every source goes on
        in its own epoch where it was.

        Raises:
            DataError: where the data of a source is not what it was.
        """
        plans = [Plan.from_dict(plan) for plan in state["plans"]]
        for plan in plans:
            for name in self.sources:
                if name in plan.sources:
                    self._check_same(name, plan.sources[name])
        self.samples_passed_over = state.get("samples_passed_over", 0)
        schedule, sample = Schedule(plans, self.sequence_length), self.first_sample(step)
        if plans[-1].mixture != self.mixture or list(plans[-1].sources) != list(self.sources):
            kept = [plan for plan in plans if plan.start_sample < sample]
            schedule = Schedule([*kept, self._plan(sample, schedule.taken(sample))], self.sequence_length)
        self.schedule = schedule
        self._ahead.clear()

    def require(self, num_steps: int) -> None:
        """Raises :class:`DataError` where the mixture's limits leave too few samples for so many steps."""
        self.schedule.samples(self.first_sample(num_steps) - 1, 1)

    def _read(self, step: int) -> list[Batch]:
        numbers = self.sample_numbers(step)
        size = self.micro_batch_size
        firsts = range(self.dp_rank * size, self.global_batch_size, self.dp_size * size)
        return [to_batch([self._read_sample(name, sample) for name, sample in numbers[first : first + size]]) for first in firsts]

    def _read_sample(self, name: str, number: int) -> Sample:
        self.waiting.reading = f"sample {number} of the source '{name}'"
        return self.sources[name].samples.read(number)

    def _plan(self, start_sample: int, taken: dict[str, int]) -> Plan:
        states = {name: SourceState(source.fingerprint, len(source.samples), taken.get(name, 0)) for name, source in self.sources.items()}
        return Plan(start_sample, self.mixture, states)

    def _check_size(self) -> None:
        for name, source in self.sources.items():
            if not len(source.samples):
                raise DataError(f"the source '{name}' is shorter than one sample of {self.sequence_length} tokens: add data to it or leave it out")
        total = sum(len(source.samples) for source in self.sources.values())
        if total < self.global_batch_size:
            raise DataError(
                f"the training split has {total} samples of {self.sequence_length} tokens, but a step over {self.dp_size} ranks needs "
                f"{self.global_batch_size}: add data, shorten train.sequence_length, or lower train.global_batch_size and start fewer ranks"
            )

    def _check_same(self, name: str, saved: SourceState) -> None:
        now = self.sources[name]
        if (now.fingerprint, len(now.samples)) != (saved.fingerprint, saved.num_samples):
            raise DataError(
                f"the run holds other data: its source '{name}' is not what it was when training began; put the old data back, "
                "give the new data another name, choose another folder with --set run_path=FOLDER, or start over with --fresh --overwrite"
            )


def open_loader(recipe: Recipe, corpora: Corpora, dp_rank: int, dp_size: int) -> Loader:
    """The training batches of one rank, from shards or from the sources themselves, as the recipe wants them.

    Raises:
        ConfigError: where the batch sizes or the mixture do not fit the ranks or the data.
        DataError: where there is too little data.
    """
    if recipe.data.streaming:
        from data_pipeline.stream import StreamLoader

        return StreamLoader(recipe, corpora, dp_rank, dp_size)
    return open_train_loader(recipe, corpora, dp_rank, dp_size)


def open_train_loader(recipe: Recipe, corpora: Corpora, dp_rank: int, dp_size: int) -> TrainLoader:
    """The training batches of one rank from shards.

    Raises:
        ConfigError: where the batch sizes or the mixture do not fit the ranks or the data.
        DataError: where there is too little data.
    """
    train = recipe.train
    sources = {
        name: TrainingSource(
            training_samples(parts, recipe.data, train.sequence_length, corpora.pad_id),
            canonical_sha256({"parts": [part.fingerprint for part in parts]}),
        )
        for name, parts in corpora.training_parts().items()
    }
    return TrainLoader(sources, recipe.data.mixture, recipe.seed, train.global_batch_size, train.micro_batch_size, dp_rank, dp_size)


def check_micro_batches(global_batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    """Raises :class:`ConfigError` where the micro batches do not divide evenly among the ranks."""
    if global_batch_size % (micro_batch_size * dp_size):
        raise ConfigError(
            f"train.global_batch_size ({global_batch_size}) is no multiple of micro_batch_size x data-parallel ranks "
            f"({micro_batch_size} x {dp_size}): change the batch sizes or the number of ranks"
        )


def seen_samples(plans: list[dict[str, Any]], consumed_samples: int, sequence_length: int, seed: int) -> dict[str, np.ndarray]:
    """Each sample of each source that a run has seen, once: int64, in the order of their first use.

    ``plans`` are those of the checkpoint's state. Every epoch is a permutation, so a source's first epoch meets each sample once and later
    ones add none.
    """
    schedule = Schedule([Plan.from_dict(plan) for plan in plans], sequence_length)
    taken = schedule.taken(consumed_samples)
    sizes = {name: source.num_samples for plan in schedule.plans for name, source in plan.sources.items()}
    return {name: shuffled(np.arange(min(taken[name], size)), size, seed) for name, size in sizes.items()}


def validation_batches(windows: Windows, micro_batch_size: int, dp_rank: int, dp_size: int, max_windows: int | None) -> Iterator[Batch]:
    """One rank's validation batches, in the stream's order; every rank gets the same number, so that collectives match.

    All windows, the shorter last one too, or ``max_windows`` of them, evenly spread and always the same. Micro batch j goes to rank
    j % dp_size; what is missing at the end is windows without loss.

    Raises:
        DataError: where the split has no target at all.
    """
    if windows.num_all == 0:
        raise DataError(
            f"the validation split has {windows.stream.num_tokens} tokens, and so none to predict: add data or raise data.validation_share"
        )
    count = windows.num_all if max_windows is None else min(max_windows, windows.num_all)
    chosen = np.arange(count) * windows.num_all // count
    padded = np.full(-(-count // (micro_batch_size * dp_size)) * micro_batch_size * dp_size, PADDING_WINDOW)
    padded[:count] = chosen
    mine = padded.reshape(-1, micro_batch_size)[dp_rank::dp_size]
    return (to_batch([windows.read(number) for number in numbers]) for numbers in mine.tolist())
