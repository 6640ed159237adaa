"""The interface between training and a loader, of shards or of the sources themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.loading.batch import Batch, Origin
from data_pipeline.loading.prefetch import PrefetchWait
from pretrain.core.files import JsonObject


@dataclass(frozen=True)
class Consumed:
    """Samples that a run has read or skipped.

    Attributes:
        samples: of all sources.
        by_source: of each source; empty for streams, which keep their positions instead.
    """

    samples: int
    by_source: dict[str, int]


class Loader(Protocol):
    """One rank's training batches.

    Attributes:
        dp_rank, dp_size: index of this rank among the data-parallel ranks, and their count.
        prefetch_wait: how long training has waited for batches.
    """

    dp_rank: int
    dp_size: int
    prefetch_wait: PrefetchWait

    def step_batches(self, step: int) -> list[Batch]:
        """This rank's micro batches of a step (from 0), one per gradient accumulation step."""

    def require(self, num_steps: int) -> None:
        """Check that there is enough data for ``num_steps`` steps.

        Raises:
            DataError: if there is not.
        """

    def epochs(self, step: int) -> float | None:
        """Passes over the training split after ``step`` steps; None if that is unknown.

        It is 1.0 once as many samples as the split has were taken from it.
        """

    def state(
        self,
        step: int,
        gather: Callable[[JsonObject], list[JsonObject]] = lambda mine: [mine],
    ) -> JsonObject:
        """Return what a checkpoint after ``step`` steps must store, as JSON.

        Args:
            gather: returns every rank's part; by default this rank is the only one.
        """

    def resume(self, state: JsonObject, step: int) -> None:
        """Continue after ``step`` steps from a checkpoint's state."""

    def position(self, step: int) -> int:
        """Samples of all sources before step ``step`` that no later step reads."""

    def consumed(self, step: int) -> Consumed:
        """Samples consumed before step ``step``, which may be in the future."""

    def pass_over(self, step: int, consumed: Consumed) -> None:
        """Make step ``step``, the next one, read the samples after ``consumed`` of each source."""

    def origins(self, step: int) -> list[Origin]:
        """Origin of each sequence of a step that was read, over all ranks.

        Empty if that is no longer known.
        """
