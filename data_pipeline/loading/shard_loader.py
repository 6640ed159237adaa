"""From shards to batches, in an order that depends only on the recipe and the step."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field

from data_pipeline.config import DataConfig, Mixture
from data_pipeline.loading.interface import Consumed
from data_pipeline.loading.mixture import MixtureEntry, MixtureSchedule, SourceState, check_names
from data_pipeline.loading.packing import training_samples
from data_pipeline.loading.plan import LoaderPhase, LoaderPlan
from data_pipeline.loading.sample_loader import SampleLoader, TrainingSource
from data_pipeline.loading.saved import read_saved
from data_pipeline.loading.shuffle import shuffled
from data_pipeline.shards.datasets import Datasets
from data_pipeline.shards.manifest import canonical_sha256
from pretrain.core.errors import DataError
from pretrain.core.files import JsonObject
from pretrain.core.saved_types import Count

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedPosition:
    """What :meth:`ShardLoader.state` keeps in a checkpoint.

    Attributes:
        plans: of each mixture of the run so far, see :meth:`MixtureEntry.to_dict`.
        samples: that the run has read or skipped.
        offset: of the samples against the steps, where batches were passed over.
        passes: over the training split when its size last changed, and the blocks until then.
    """

    plans: Annotated[list[JsonObject], Field(min_length=1)]
    samples: Count
    offset: int
    passes: tuple[float, float] = (0.0, 0.0)


class ShardLoader(SampleLoader):
    """One rank's training batches in the order of a mixture of shuffled sources.

    Args:
        sources: by name, in samples of the run's longest sequence.
        phases: of the run, in order; the first one begins with step 0.
        seed: of the sample order.
        dp_rank, dp_size: index of this rank among the data-parallel ranks, and their count.

    Raises:
        ConfigError: if the micro batches do not divide evenly among the ranks, or a mixture names
            other sources.
        DataError: if the data has fewer samples than one step needs, or a source has none.
    """

    def __init__(
        self,
        sources: Mapping[str, TrainingSource],
        phases: Sequence[LoaderPhase],
        seed: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        super().__init__(sources, phases, dp_rank, dp_size)
        for phase in phases:
            check_names(phase.mixture, list(sources), phase.mixture_key)
        self.seed = seed
        self._check_size()
        # Passes over the training split up to a block; after it, passes are counted in blocks of
        # the split as it is now.
        self._passes: tuple[float, float] = (0.0, 0.0)
        self.schedule = self._with_coming([self._entry(0, {}, self.phases[0].mixture)], 0)

    def sample_numbers(self, step: int) -> list[tuple[str, int]]:
        """Source and sample index of each sequence of the whole step, over all ranks.

        Of shorter sequences it is the sample that they are a part of.
        """
        phase = self.phase_at(step)
        found: list[tuple[str, int]] = [("", 0)] * phase.global_batch_size
        for name, places, numbers in self.schedule.samples(
            self._offset + phase.first_block_of(step), phase.global_batch_size
        ):
            samples = shuffled(numbers, len(self.sources[name].samples), self.seed)
            for place, sample in zip(places.tolist(), samples.tolist(), strict=True):
                found[place] = (name, sample)
        return found

    def consumed(self, step: int) -> Consumed:
        """Samples consumed before step ``step``, in all and by source."""
        samples = self.position(step)
        return Consumed(samples, self.schedule.taken(samples))

    def pass_over(self, step: int, consumed: Consumed) -> None:
        """Make step ``step`` and all later ones read the samples after ``consumed``.

        If other mixtures than this step's have taken some of them, each source continues after
        what was taken from it.
        """
        phase = self.phase_at(step)
        first_block = self._offset + phase.first_block_of(step)
        entries = [entry for entry in self.schedule.entries if entry.start_sample <= first_block]
        if MixtureSchedule(entries).taken(consumed.samples) != consumed.by_source:
            entries.append(self._entry(consumed.samples, consumed.by_source, phase.mixture))
        self._offset = consumed.samples - phase.first_block_of(step)
        self.schedule = self._with_coming(entries, step)
        self._ahead.clear()

    def epochs(self, step: int) -> float:
        """Passes over the training split after ``step`` steps.

        Samples of a mixture count as those of the whole, so one epoch of it may read a small source
        more than once.
        """
        passes, since = self._passes
        return passes + (self._blocks(step) - since) / self._num_samples()

    def state(
        self, step: int, gather: Callable[[JsonObject], list[JsonObject]] | None = None
    ) -> JsonObject:
        """The mixtures of the run so far, from which the consumed samples follow.

        It is the same on all ranks, so nothing is gathered.
        """
        samples = self.position(step)
        plans = [
            entry.to_dict()
            for entry in self.schedule.entries
            if entry.start_sample < samples or entry.start_sample == 0
        ]
        return asdict(SavedPosition(plans, samples, self._offset, self._passes))

    def resume(self, state: JsonObject, step: int) -> None:
        """Continue after ``step`` steps.

        If the mixture or its sources have changed, the new ones apply from here on, and every
        source continues in its own epoch. If the longest sequence has changed, every source starts
        a new order, with a warning.

        Raises:
            CheckpointError: if ``state`` is none.
            DataError: if the data of a source is not what it was.
        """
        saved = read_saved(SavedPosition, state)
        entries = [MixtureEntry.from_dict(plan) for plan in saved.plans]
        samples = saved.samples
        phase = self.phase_at(step)
        for entry in entries:
            for name in self.sources:
                if name in entry.sources:
                    self._check_same(name, entry)
        last = entries[-1]
        taken = MixtureSchedule(entries).taken(samples)
        self._offset = saved.offset
        if last.sequence_length != self.sequence_length:
            self._warn_of_new_order(last.sequence_length)
            self._offset = samples - phase.first_block_of(step)
            taken = {}
        is_same = (
            last.mixture == phase.mixture
            # Compared as lists: the order of the sources decides which one gets a sample.
            and list(last.sources) == list(self.sources)
            and last.sequence_length == self.sequence_length
        )
        if not is_same:
            entries = [entry for entry in entries if entry.start_sample < samples]
            entries.append(self._entry(samples, taken, phase.mixture))
        passes, since = saved.passes
        samples_before = sum(source.num_samples for source in last.sources.values())
        if samples_before != self._num_samples():
            passes += (samples - since) / samples_before
            since = self._blocks(step)
        self._passes = (passes, since)
        self.schedule = self._with_coming(entries, step)
        self._ahead.clear()

    def require(self, num_steps: int) -> None:
        """Check that the mixture's limits leave enough samples for ``num_steps`` steps.

        Raises:
            DataError: if they do not.
        """
        self.schedule.samples(self.position(num_steps) - 1, 1)

    def _num_samples(self) -> int:
        """Samples of one epoch of all sources."""
        return sum(len(source.samples) for source in self.sources.values())

    def _entry(self, start_sample: int, taken: dict[str, int], mixture: Mixture) -> MixtureEntry:
        states = {
            name: SourceState(source.fingerprint, len(source.samples), taken.get(name, 0))
            for name, source in self.sources.items()
        }
        return MixtureEntry(start_sample, mixture, states, self.sequence_length)

    def _with_coming(self, entries: list[MixtureEntry], step: int) -> MixtureSchedule:
        """``entries``, and one for each phase after ``step`` that changes the mixture."""
        for phase in self.phases:
            if phase.first_step > step and phase.mixture != entries[-1].mixture:
                start = self._offset + phase.first_block
                taken = MixtureSchedule(entries).taken(start)
                entries = [*entries, self._entry(start, taken, phase.mixture)]
        return MixtureSchedule(entries)

    def _warn_of_new_order(self, length_before: int) -> None:
        message = (
            f"the longest sequence is {self.sequence_length} tokens now and was {length_before}: "
            "every source starts again, in another order, and what was read may come again; to "
            "read nothing twice, name the longest sequence in the phases from the first step on"
        )
        logger.warning("%s", message)
        if self.dp_rank == 0:
            print(f"warning: {message}", file=sys.stderr)

    def _check_size(self) -> None:
        for name, source in self.sources.items():
            if not len(source.samples):
                raise DataError(
                    f"the source '{name}' is shorter than one sample of {self.sequence_length} "
                    "tokens: add data to it or leave it out"
                )
        needed = max(phase.global_batch_size for phase in self.phases)
        if self._num_samples() < needed:
            raise DataError(
                f"the training split has {self._num_samples()} samples of {self.sequence_length} "
                f"tokens, but a step over {self.dp_size} ranks needs {needed}: add data, shorten "
                "train.sequence_length, or lower train.global_batch_size and start fewer ranks"
            )

    def _check_same(self, name: str, entry: MixtureEntry) -> None:
        now = self.sources[name]
        saved = entry.sources[name]
        # Another sequence length makes another number of samples of the same data.
        has_other_length = entry.sequence_length != self.sequence_length
        is_same_size = len(now.samples) == saved.num_samples or has_other_length
        if now.fingerprint != saved.fingerprint or not is_same_size:
            raise DataError(
                f"the run holds other data: its source '{name}' is not what it was when training "
                "began; put the old data back, give the new data another name, choose another "
                "folder with --set run_path=FOLDER, or start over with --fresh --overwrite"
            )


def open_shard_loader(
    data: DataConfig, datasets: Datasets, plan: LoaderPlan, dp_rank: int, dp_size: int
) -> ShardLoader:
    """The training batches of one rank from shards.

    Raises:
        ConfigError: if the batch sizes or the mixture do not fit the ranks or the data.
        DataError: if there is too little data.
    """
    sources = {
        name: TrainingSource(
            training_samples(shards, data, plan.sequence_length, datasets.pad_id),
            canonical_sha256({"parts": [part.fingerprint for part in shards]}),
        )
        for name, shards in datasets.training_shards().items()
    }
    return ShardLoader(sources, plan.phases, plan.seed, dp_rank, dp_size)
