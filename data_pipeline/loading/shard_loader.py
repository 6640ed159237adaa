"""From shards to batches, in an order that depends on nothing but the recipe and the step."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_pipeline.config import Mixture
from data_pipeline.loading.batch import Batch, Origin, Sample, Samples, to_batch
from data_pipeline.loading.mixture import MixtureEntry, MixtureSchedule, SourceState, check_names
from data_pipeline.loading.packing import PADDING_WINDOW, Windows, training_samples
from data_pipeline.loading.prefetch import Waiting
from data_pipeline.loading.shuffle import shuffled
from data_pipeline.shards.datasets import Datasets
from data_pipeline.shards.manifest import canonical_sha256
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Timeline
from pretrain.core.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# Read ahead of the step that is asked for, so that a slow disk has to be slow for as long before training waits.
STEPS_AHEAD = 3


@dataclass(frozen=True)
class Consumed:
    """What a run has read or passed over: samples of all sources, and of each of them; streams, which keep their places, do not count those."""

    samples: int
    by_source: dict[str, int]


class Loader(Protocol):
    """One rank's training batches.

    Attributes:
        waiting: how long training has waited for batches.
    """

    dp_rank: int
    dp_size: int
    waiting: Waiting

    def step_batches(self, step: int) -> list[Batch]:
        """This rank's micro batches of a step (from 0), one for each gradient accumulation step."""

    def require(self, num_steps: int) -> None:
        """Whether there is data for so many steps.

        Raises:
            DataError: where there is not.
        """

    def epochs(self, step: int) -> float | None:
        """Passes over the training split after ``step`` steps: 1.0 when as many samples as it has were taken of it. None where that is not known."""

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after ``step`` steps has to carry, as JSON."""

    def resume(self, state: dict[str, Any], step: int) -> None:
        """Goes on after ``step`` steps from what a checkpoint carries."""

    def position(self, step: int) -> int:
        """Samples, over all sources, that stand before step ``step`` and that no later step reads."""

    def consumed(self, step: int) -> Consumed:
        """What is consumed before step ``step``, which may lie ahead."""

    def pass_over(self, step: int, consumed: Consumed) -> None:
        """Gives step ``step``, which comes next, and all later ones the samples behind ``consumed``, of every source."""

    def origins(self, step: int) -> list[Origin]:
        """Where each sequence of a step that was read comes from, over all ranks; empty where that is no longer known."""


@dataclass(frozen=True)
class TrainingSource:
    """A source of the mixture: its samples, and the fingerprint of the data that they are made of."""

    samples: Samples
    fingerprint: str


@dataclass(frozen=True)
class LoaderPhase:
    """Steps with the same batch sizes, sequence length and mixture.

    Attributes:
        global_batch_size, micro_batch_size: in sequences.
        first_step, first_block: the steps before it, and the blocks that they take.
        slices: sequences in a block, see :mod:`pretrain.config.timeline`.
        where: the mixture's field, for sentences.
    """

    mixture: Mixture
    global_batch_size: int
    micro_batch_size: int
    first_step: int = 0
    first_block: int = 0
    slices: int = 1
    where: str = "data.mixture"

    def first_block_of(self, step: int) -> int:
        return self.first_block + (step - self.first_step) // self.slices * self.global_batch_size

    def blocks_after(self, step: int) -> int:
        """Blocks that the run has begun to read after ``step`` steps."""
        return (
            self.first_block + -(-(step - self.first_step) // self.slices) * self.global_batch_size
        )


def loader_phases(recipe: Recipe) -> list[LoaderPhase]:
    """The recipe's phases as the loader sees them."""
    found = []
    for stage in Timeline(recipe).stages:
        train, own = stage.recipe.train, stage.recipe.data.mixture != recipe.data.mixture
        where = f"phases.{stage.name}.mixture" if own else "data.mixture"
        sizes = train.global_batch_size, train.micro_batch_size
        found.append(
            LoaderPhase(
                stage.recipe.data.mixture,
                *sizes,
                stage.first_step,
                stage.first_block,
                stage.slices,
                where,
            )
        )
    return found


class TrainLoader:
    """One rank's training batches, a pure function of the step: to resume, ask for the next step.

    Micro batch number j of a step holds its samples j * micro_batch_size onwards, and goes to rank j % dp_size. So with a fixed micro batch
    size the step's micro batches are the same for any number of ranks; they only lie on other ones. A background thread reads ahead.

    Args:
        sources: by name, in samples of the run's longest sequence.
        stretches: of the run, the first one from step 0.
        seed: of the sample order.
        dp_rank, dp_size: this rank's number among the data-parallel ranks, and how many there are.

    Raises:
        ConfigError: where the micro batches do not divide evenly among the ranks, or a mixture names other sources.
        DataError: where the data has fewer samples than one step needs, or a source has none.
    """

    def __init__(
        self,
        sources: Mapping[str, TrainingSource],
        phases: Sequence[LoaderPhase],
        seed: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        for phase in phases:
            check_micro_batches(phase.global_batch_size, phase.micro_batch_size, dp_size)
            check_names(phase.mixture, list(sources), phase.where)
        self.sources, self.phases, self.seed = dict(sources), list(phases), seed
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.sequence_length = next(iter(sources.values())).samples.sequence_length
        self._check_size()
        # Blocks are counted from the run's beginning. They differ from the stretches' count where earlier blocks had another length.
        self._offset = 0
        # Passes over the training split up to a block, from which on they are counted in blocks of the split as it is now.
        self._passes: tuple[float, float] = (0.0, 0.0)
        self.schedule = self._with_coming([self._plan(0, {}, self.phases[0].mixture)], 0)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="train-loader")
        self._ahead: deque[tuple[int, Future[list[Batch]]]] = deque()
        self.waiting = Waiting()

    def phase_at(self, step: int) -> LoaderPhase:
        return next(phase for phase in reversed(self.phases) if phase.first_step <= step)

    def sample_numbers(self, step: int) -> list[tuple[str, int]]:
        """The source and the sample in it of each sequence of the whole step, over all ranks; of shorter sequences, the sample they are part of."""
        phase = self.phase_at(step)
        found: list[tuple[str, int]] = [("", 0)] * phase.global_batch_size
        for name, places, numbers in self.schedule.samples(
            self._offset + phase.first_block_of(step), phase.global_batch_size
        ):
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

    def position(self, step: int) -> int:
        """Samples before step ``step``; what it shares with the step before, which reads the same blocks, is among them."""
        return self._offset + self.phase_at(max(step - 1, 0)).blocks_after(step)

    def consumed(self, step: int) -> Consumed:
        samples = self.position(step)
        return Consumed(samples, self.schedule.taken(samples))

    def pass_over(self, step: int, consumed: Consumed) -> None:
        """Gives step ``step`` and all later ones the samples behind ``consumed``. Where other mixtures than this step's have taken some of them,
        each source goes on behind what was taken of it.
        """
        phase = self.phase_at(step)
        plans = [
            plan
            for plan in self.schedule.plans
            if plan.start_sample <= self._offset + phase.first_block_of(step)
        ]
        if MixtureSchedule(plans).taken(consumed.samples) != consumed.by_source:
            plans = [*plans, self._plan(consumed.samples, consumed.by_source, phase.mixture)]
        self._offset = consumed.samples - phase.first_block_of(step)
        self.schedule = self._with_coming(plans, step)
        self._ahead.clear()

    def origins(self, step: int) -> list[Origin]:
        """Where each sequence of a step comes from, over all ranks."""
        return [
            Origin(name, self.sources[name].samples.documents(sample))
            for name, sample in self.sample_numbers(step)
        ]

    def epochs(self, step: int) -> float:
        """Samples of a mixture count as those of the whole, so an epoch of it may take a small source more often than once."""
        passes, since = self._passes
        return passes + (self._blocks(step) - since) / sum(
            len(source.samples) for source in self.sources.values()
        )

    def state(self, step: int) -> dict[str, Any]:
        """The mixtures of the run so far: with the number of samples they say which ones it has taken or passed over."""
        samples = self.position(step)
        plans = [
            plan.to_dict()
            for plan in self.schedule.plans
            if plan.start_sample < samples or plan.start_sample == 0
        ]
        return {"plans": plans, "samples": samples, "offset": self._offset, "passes": self._passes}

    def resume(self, state: dict[str, Any], step: int) -> None:
        """Goes on after ``step`` steps. Where the mixture or its sources have changed, the new ones hold from here on, and every source goes on
        in its own epoch where it was. Where the longest sequence has changed, every source begins a new order, and that is told.

        Raises:
            DataError: where the data of a source is not what it was.
        """
        plans, samples, phase = (
            [MixtureEntry.from_dict(plan) for plan in state["plans"]],
            state["samples"],
            self.phase_at(step),
        )
        for plan in plans:
            for name in self.sources:
                if name in plan.sources:
                    self._check_same(name, plan)
        last, taken = plans[-1], MixtureSchedule(plans).taken(samples)
        self._offset = state["offset"]
        if last.sequence_length != self.sequence_length:
            self._tell_new_order(last.sequence_length)
            self._offset, taken = samples - phase.first_block_of(step), {}
        if (last.mixture, list(last.sources), last.sequence_length) != (
            phase.mixture,
            list(self.sources),
            self.sequence_length,
        ):
            plans = [
                *(plan for plan in plans if plan.start_sample < samples),
                self._plan(samples, taken, phase.mixture),
            ]
        passes, since = state.get("passes", (0.0, 0.0))
        before, now = (
            sum(source.num_samples for source in last.sources.values()),
            sum(len(source.samples) for source in self.sources.values()),
        )
        self._passes = (
            (passes, since)
            if before == now
            else (passes + (samples - since) / before, self._blocks(step))
        )
        self.schedule = self._with_coming(plans, step)
        self._ahead.clear()

    def require(self, num_steps: int) -> None:
        """Raises :class:`DataError` where the mixture's limits leave too few samples for so many steps."""
        self.schedule.samples(self.position(num_steps) - 1, 1)

    def _blocks(self, step: int) -> float:
        """Blocks that ``step`` steps have used up; of one that shorter sequences share, the part that was read."""
        phase = self.phase_at(max(step - 1, 0))
        return (
            self._offset
            + phase.first_block
            + (step - phase.first_step) * phase.global_batch_size / phase.slices
        )

    def _read(self, step: int) -> list[Batch]:
        phase, numbers = self.phase_at(step), self.sample_numbers(step)
        size, part = phase.micro_batch_size, (step - phase.first_step) % phase.slices
        firsts = range(self.dp_rank * size, phase.global_batch_size, self.dp_size * size)
        groups = (
            [self._read_sample(name, sample) for name, sample in numbers[first : first + size]]
            for first in firsts
        )
        return [
            to_batch(
                [sample.part(part, phase.slices) for sample in group] if phase.slices > 1 else group
            )
            for group in groups
        ]

    def _read_sample(self, name: str, number: int) -> Sample:
        self.waiting.reading = f"sample {number} of the source '{name}'"
        return self.sources[name].samples.read(number)

    def _plan(self, start_sample: int, taken: dict[str, int], mixture: Mixture) -> MixtureEntry:
        states = {
            name: SourceState(source.fingerprint, len(source.samples), taken.get(name, 0))
            for name, source in self.sources.items()
        }
        return MixtureEntry(start_sample, mixture, states, self.sequence_length)

    def _with_coming(self, plans: list[MixtureEntry], step: int) -> MixtureSchedule:
        """``plans``, and one for each stretch behind ``step`` with another mixture than the stretch before it."""
        for phase in self.phases:
            if phase.first_step > step and phase.mixture != plans[-1].mixture:
                start = self._offset + phase.first_block
                plans = [
                    *plans,
                    self._plan(start, MixtureSchedule(plans).taken(start), phase.mixture),
                ]
        return MixtureSchedule(plans)

    def _tell_new_order(self, length_before: int) -> None:
        message = (
            f"the longest sequence is {self.sequence_length} tokens now and was {length_before}: every source begins anew, in another order, and "
            "what was read may come again; to read nothing twice, name the longest sequence in the phases from the first step on"
        )
        logger.warning("%s", message)
        if self.dp_rank == 0:
            print(f"warning: {message}", file=sys.stderr)

    def _check_size(self) -> None:
        for name, source in self.sources.items():
            if not len(source.samples):
                raise DataError(
                    f"the source '{name}' is shorter than one sample of {self.sequence_length} tokens: add data to it or leave it out"
                )
        total, needed = (
            sum(len(source.samples) for source in self.sources.values()),
            max(phase.global_batch_size for phase in self.phases),
        )
        if total < needed:
            raise DataError(
                f"the training split has {total} samples of {self.sequence_length} tokens, but a step over {self.dp_size} ranks needs "
                f"{needed}: add data, shorten train.sequence_length, or lower train.global_batch_size and start fewer ranks"
            )

    def _check_same(self, name: str, plan: MixtureEntry) -> None:
        now, saved = self.sources[name], plan.sources[name]
        same_size = (
            len(now.samples) == saved.num_samples or plan.sequence_length != self.sequence_length
        )
        if now.fingerprint != saved.fingerprint or not same_size:
            raise DataError(
                f"the run holds other data: its source '{name}' is not what it was when training began; put the old data back, "
                "give the new data another name, choose another folder with --set run_path=FOLDER, or start over with --fresh --overwrite"
            )


def open_loader(recipe: Recipe, datasets: Datasets, dp_rank: int, dp_size: int) -> Loader:
    """The training batches of one rank, from shards or from the sources themselves, as the recipe wants them.

    Raises:
        ConfigError: where the batch sizes or the mixture do not fit the ranks or the data.
        DataError: where there is too little data.
    """
    if recipe.data.streaming:
        from data_pipeline.loading.stream_loader import StreamLoader

        return StreamLoader(recipe, datasets, dp_rank, dp_size)
    return open_train_loader(recipe, datasets, dp_rank, dp_size)


def open_train_loader(
    recipe: Recipe, datasets: Datasets, dp_rank: int, dp_size: int
) -> TrainLoader:
    """The training batches of one rank from shards.

    Raises:
        ConfigError: where the batch sizes or the mixture do not fit the ranks or the data.
        DataError: where there is too little data.
    """
    block_tokens = Timeline(recipe).block_tokens
    sources = {
        name: TrainingSource(
            training_samples(parts, recipe.data, block_tokens, datasets.pad_id),
            canonical_sha256({"parts": [part.fingerprint for part in parts]}),
        )
        for name, parts in datasets.training_parts().items()
    }
    return TrainLoader(sources, loader_phases(recipe), recipe.seed, dp_rank, dp_size)


def check_micro_batches(global_batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    """Raises :class:`ConfigError` where the micro batches do not divide evenly among the ranks."""
    if global_batch_size % (micro_batch_size * dp_size):
        raise ConfigError(
            f"train.global_batch_size ({global_batch_size}) is no multiple of micro_batch_size x data-parallel ranks "
            f"({micro_batch_size} x {dp_size}): change the batch sizes or the number of ranks"
        )


def seen_samples(
    plans: list[dict[str, Any]], consumed_samples: int, seed: int
) -> dict[str, np.ndarray]:
    """Each sample of each source that a run has seen, once: int64, in the order of their first use.

    ``plans`` are those of the checkpoint's state. Every epoch is a permutation, so a source's first epoch meets each sample once and later
    ones add none.

    Raises:
        DataError: where the run has changed its longest sequence on a resume, and with it what a sample is.
    """
    schedule = MixtureSchedule([MixtureEntry.from_dict(plan) for plan in plans])
    if len({plan.sequence_length for plan in schedule.plans}) > 1:
        raise DataError(
            "which samples the model has seen cannot be told of a run whose longest sequence was changed on the way"
        )
    taken = schedule.taken(consumed_samples)
    sizes = {
        name: source.num_samples for plan in schedule.plans for name, source in plan.sources.items()
    }
    return {
        name: shuffled(np.arange(min(taken[name], size)), size, seed)
        for name, size in sizes.items()
    }


def validation_batches(
    windows: Windows, micro_batch_size: int, dp_rank: int, dp_size: int, max_windows: int | None
) -> Iterator[Batch]:
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
    padded = np.full(
        -(-count // (micro_batch_size * dp_size)) * micro_batch_size * dp_size, PADDING_WINDOW
    )
    padded[:count] = chosen
    mine = padded.reshape(-1, micro_batch_size)[dp_rank::dp_size]
    return (to_batch([windows.read(number) for number in numbers]) for numbers in mine.tolist())
