"""What every loader of numbered samples does: it shares a step's samples out, and reads ahead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from data_pipeline.loading.batch import Batch, Origin, Sample, Samples, to_batch
from data_pipeline.loading.plan import LoaderPhase, check_micro_batches
from data_pipeline.loading.prefetch import PrefetchWait
from pretrain.core import faults

# Steps read ahead of the requested one: storage may stall for as long before training waits.
STEPS_AHEAD = 3


@dataclass(frozen=True)
class TrainingSource:
    """A source of the mixture: its samples, and the fingerprint of the data behind them."""

    samples: Samples
    fingerprint: str


class SampleLoader(ABC):
    """One rank's training batches, a pure function of the step: to resume, ask for the next step.

    Micro batch j of a step holds its samples from j * micro_batch_size on, and goes to rank
    j % dp_size. So with a fixed micro batch size the step's micro batches are the same for any
    number of ranks; only the rank that gets them differs. A background thread reads ahead.

    Args:
        sources: by name, in samples of the run's longest sequence.
        phases: of the run, in order; the first one begins with step 0.
        dp_rank, dp_size: index of this rank among the data-parallel ranks, and their count.

    Raises:
        ConfigError: if the micro batches do not divide evenly among the ranks.
    """

    def __init__(
        self,
        sources: Mapping[str, TrainingSource],
        phases: Sequence[LoaderPhase],
        dp_rank: int,
        dp_size: int,
    ) -> None:
        for phase in phases:
            check_micro_batches(phase.global_batch_size, phase.micro_batch_size, dp_size)
        self.sources = dict(sources)
        self.phases = list(phases)
        self.sequence_length = next(iter(sources.values())).samples.sequence_length
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        # Blocks are counted from the start of the run. The phases count differently if earlier
        # blocks had another length.
        self._offset = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="shard-loader")
        self._ahead: deque[tuple[int, Future[list[Batch]]]] = deque()
        self.prefetch_wait = PrefetchWait()

    @abstractmethod
    def sample_numbers(self, step: int) -> list[tuple[str, int]]:
        """Source and sample index of each sequence of the whole step, over all ranks.

        Of shorter sequences it is the sample that they are a part of.
        """

    def phase_at(self, step: int) -> LoaderPhase:
        """The phase of step ``step`` (from 0)."""
        return next(phase for phase in reversed(self.phases) if phase.first_step <= step)

    def step_batches(self, step: int) -> list[Batch]:
        """This rank's micro batches of a step (from 0), one per gradient accumulation step."""
        if not self._ahead or self._ahead[0][0] != step:
            self._ahead.clear()
        while len(self._ahead) <= STEPS_AHEAD:
            ahead = step + len(self._ahead)
            # One thread reads the steps in order: two would only compete for the disk.
            self._ahead.append((ahead, self._reader.submit(self._read, ahead)))
        return self.prefetch_wait.result(self._ahead.popleft()[1])

    def position(self, step: int) -> int:
        """Samples before step ``step``, including those that the step before shares with it."""
        return self._offset + self.phase_at(max(step - 1, 0)).blocks_after(step)

    def origins(self, step: int) -> list[Origin]:
        """Origin of each sequence of a step, over all ranks."""
        return [
            Origin(name, self.sources[name].samples.documents(sample))
            for name, sample in self.sample_numbers(step)
        ]

    def _blocks(self, step: int) -> float:
        """Blocks that ``step`` steps have used up; a block shared by steps counts in part."""
        phase = self.phase_at(max(step - 1, 0))
        read = (step - phase.first_step) * phase.global_batch_size / phase.slices
        return self._offset + phase.first_block + read

    def _read(self, step: int) -> list[Batch]:
        faults.reached("data.read")
        phase = self.phase_at(step)
        numbers = self.sample_numbers(step)
        size = phase.micro_batch_size
        part = (step - phase.first_step) % phase.slices
        batches = []
        # The ranks take micro batches alternately, so a step has the same samples on any number of
        # ranks.
        for first in range(self.dp_rank * size, phase.global_batch_size, self.dp_size * size):
            group = [
                self._read_sample(name, sample) for name, sample in numbers[first : first + size]
            ]
            if phase.slices > 1:
                group = [sample.part(part, phase.slices) for sample in group]
            batches.append(to_batch(group))
        return batches

    def _read_sample(self, name: str, number: int) -> Sample:
        self.prefetch_wait.reading = f"sample {number} of the source '{name}'"
        return self.sources[name].samples.read(number)
