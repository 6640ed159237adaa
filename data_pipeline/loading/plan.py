"""The numbers of a run that a loader needs; the recipe stays with the caller.

Without torch, so that the configuration can build a plan before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.config import Mixture
from pretrain.core.errors import ConfigError


@dataclass(frozen=True)
class LoaderPhase:
    """Steps with the same batch sizes, sequence length and mixture.

    Attributes:
        global_batch_size, micro_batch_size: in sequences.
        first_step: steps of the run before the phase.
        first_block: blocks that those steps use up; a block is one sample of the run's longest
            sequence.
        slices: sequences in a block, see :mod:`pretrain.config.timeline`.
        mixture_key: the recipe's field that holds the mixture, for error sentences.
    """

    mixture: Mixture
    global_batch_size: int
    micro_batch_size: int
    first_step: int = 0
    first_block: int = 0
    slices: int = 1
    mixture_key: str = "data.mixture"

    def first_block_of(self, step: int) -> int:
        """The first block that ``step`` reads, counted from the start of the run."""
        groups = (step - self.first_step) // self.slices
        return self.first_block + groups * self.global_batch_size

    def blocks_after(self, step: int) -> int:
        """Blocks that the run has begun to read after ``step`` steps."""
        groups = -(-(step - self.first_step) // self.slices)
        return self.first_block + groups * self.global_batch_size


@dataclass(frozen=True)
class LoaderPlan:
    """Batch sizes, sample size and order of a whole run.

    Attributes:
        phases: in order; the first one begins with step 0.
        sequence_length: tokens of a sample, which is the run's longest sequence.
        seed: of the sample order.
        num_samples: of all steps.
        origin_steps: a stream remembers at least that many steps' origins.
    """

    phases: Sequence[LoaderPhase]
    sequence_length: int
    seed: int
    num_samples: int
    origin_steps: int = 1


def check_micro_batches(global_batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    """Check that the micro batches divide evenly among the ranks.

    Raises:
        ConfigError: if they do not.
    """
    if global_batch_size % (micro_batch_size * dp_size):
        raise ConfigError(
            f"train.global_batch_size ({global_batch_size}) is no multiple of micro_batch_size x "
            f"data-parallel ranks ({micro_batch_size} x {dp_size}): change the batch sizes or the "
            "number of ranks"
        )
