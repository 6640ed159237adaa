"""Batches in Megatron's order: step k holds the samples that Megatron-LM's step k holds.

Its MegatronPretrainingSampler gives rank r of D in micro step m the samples from
``consumed_samples + (m * D + r) * micro_batch_size`` on, which is how our ranks take theirs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.loading.interface import Consumed
from data_pipeline.loading.megatron.order import Order, open_order, plan_order
from data_pipeline.loading.megatron.samples import MegatronSamples, SampleOptions
from data_pipeline.loading.mixture import check_names
from data_pipeline.loading.plan import LoaderPhase, LoaderPlan
from data_pipeline.loading.sample_loader import SampleLoader, TrainingSource
from data_pipeline.loading.saved import read_saved
from data_pipeline.shards.datasets import Datasets
from pretrain.core.errors import DataError
from pretrain.core.files import JsonObject
from pretrain.core.saved_types import Count

logger = logging.getLogger(__name__)

WAYS_OUT = (
    "choose another folder with --set run_path=FOLDER, or start over with --fresh --overwrite"
)


@dataclass(frozen=True)
class MadeFor:
    """What an order follows from, apart from the data; a change of any of it is another order."""

    num_samples: Count
    sequence_length: Count
    seed: Count
    weights: list[float] | None
    surplus: float
    masks_eod_loss: bool


@dataclass(frozen=True)
class SavedOrder:
    """What :meth:`MegatronLoader.state` keeps in a checkpoint.

    Attributes:
        samples: that the run has read or skipped: Megatron's ``consumed_train_samples``.
        offset: of the samples against the steps, where batches were passed over.
        sources: fingerprints by name, in their order.
    """

    order: Literal["megatron"]
    samples: Count
    offset: int
    made_for: MadeFor
    sources: dict[str, str]


class MegatronLoader(SampleLoader):
    """One rank's training batches in Megatron's order.

    Raises:
        ConfigError: if the micro batches do not divide evenly among the ranks.
    """

    def __init__(
        self,
        order: Order,
        options: SampleOptions,
        phases: Sequence[LoaderPhase],
        dp_rank: int,
        dp_size: int,
    ) -> None:
        length = order.plan.sequence_length
        sources = {
            source.name: TrainingSource(
                MegatronSamples(source.stream, length, indices, options), source.fingerprint
            )
            for source, indices in zip(order.plan.sources, order.indices, strict=True)
        }
        super().__init__(sources, phases, dp_rank, dp_size)
        self.order = order
        plan = order.plan
        self.made_for = MadeFor(
            plan.asked_samples,
            plan.sequence_length,
            plan.seed,
            None if plan.shares is None else list(plan.shares),
            plan.surplus,
            options.eod_mask_loss,
        )
        self._has_warned = False

    def sample_numbers(self, step: int) -> list[tuple[str, int]]:
        """Source and sample index of each sequence of the whole step, over all ranks."""
        phase = self.phase_at(step)
        first = self._offset + phase.first_block_of(step)
        numbers = np.arange(first, first + phase.global_batch_size)
        # Only a run that has passed over samples gets here beyond the order's end.
        return self.order.samples(numbers % self.order.plan.num_samples)

    def consumed(self, step: int) -> Consumed:
        """Samples consumed before step ``step``, in all and by source."""
        samples = self.position(step)
        rounds, rest = divmod(samples, self.order.plan.num_samples)
        taken = self.order.taken(rest)
        if rounds:
            whole = self.order.taken(self.order.plan.num_samples)
            taken = {name: rounds * whole[name] + count for name, count in taken.items()}
        return Consumed(samples, taken)

    def seen_samples(self, step: int) -> dict[str, np.ndarray]:
        """Each sample of each source that was read before step ``step``, once: int64."""
        return {
            name: np.arange(min(count, len(self.sources[name].samples)))
            for name, count in self.consumed(step).by_source.items()
        }

    def pass_over(self, step: int, consumed: Consumed) -> None:
        """Make step ``step`` and all later ones read the samples after ``consumed``."""
        self._offset = consumed.samples - self.phase_at(step).first_block_of(step)
        self._ahead.clear()

    def epochs(self, step: int) -> float:
        """Passes over the training split after ``step`` steps."""
        return self._blocks(step) / self.order.plan.epoch_samples

    def state(
        self, step: int, gather: Callable[[JsonObject], list[JsonObject]] | None = None
    ) -> JsonObject:
        """The position in the order, and what the order was made for; the same on all ranks."""
        fingerprints = {name: source.fingerprint for name, source in self.sources.items()}
        saved = SavedOrder(
            "megatron", self.position(step), self._offset, self.made_for, fingerprints
        )
        return asdict(saved)

    def resume(self, state: JsonObject, step: int) -> None:
        """Continue after ``step`` steps.

        Raises:
            CheckpointError: if ``state`` is none.
            DataError: if the order was made for something else, or of other data.
        """
        if "order" not in state:
            raise DataError(
                "the checkpoint is of a run with another data.order, whose samples are others: put"
                f" it back, {WAYS_OUT}"
            )
        saved = read_saved(SavedOrder, state)
        for name, source in self.sources.items():
            if saved.sources.get(name, source.fingerprint) != source.fingerprint:
                raise DataError(
                    f"the run holds other data: its source '{name}' is not what it was when"
                    f" training began; put the old data back, {WAYS_OUT}"
                )
        if list(saved.sources) != list(self.sources):
            raise DataError(
                f"the run blends the sources {', '.join(saved.sources)}, and the data now have"
                f" {', '.join(self.sources)}: put them back, {WAYS_OUT}"
            )
        before, now = asdict(saved.made_for), asdict(self.made_for)
        for name, value in now.items():
            if before[name] != value:
                raise DataError(_another_order(name, before[name], value))
        self._offset = saved.offset
        self._ahead.clear()

    def require(self, num_steps: int) -> None:
        """Check that the order has enough samples for ``num_steps`` steps.

        Samples that a guard has passed over do not count: after the order's end it begins again.

        Raises:
            DataError: if it has not.
        """
        size = self.order.plan.num_samples
        needed = self.position(num_steps)
        if needed - self._offset > size:
            raise DataError(
                f"the run needs {needed - self._offset} samples, and Megatron's order has {size}:"
                " raise data.order.samples to the run's, lower train.train_tokens, or give shares"
                " with data.mixture.kind=weights, without which each of several sources is read"
                " once at most"
            )
        if needed > size and not self._has_warned:
            self._has_warned = True
            message = (
                f"{self._offset} samples were passed over, so that Megatron's order ends"
                f" {needed - size} samples before the run: then it begins again"
            )
            logger.warning("%s", message)
            if self.dp_rank == 0:
                print(f"warning: {message}", file=sys.stderr)


def _another_order(name: str, before: object, now: object) -> str:
    if name == "num_samples":
        return (
            f"the run's order was made for {before} samples, and would now be made for {now}, which"
            " is another order from the first sample on: put the run's length back, or keep the"
            f" order with --set data.order.samples={before}, for a run that is no longer"
        )
    return (
        f"the run's order was made with {name} {before}, and the recipe now gives {now}, which is"
        f" another order: put it back, {WAYS_OUT}"
    )


def open_megatron_loader(
    data: DataConfig, datasets: Datasets, plan: LoaderPlan, dp_rank: int, dp_size: int
) -> MegatronLoader:
    """The training batches of one rank in Megatron's order.

    Raises:
        ConfigError: if the batch sizes or the mixture do not fit the ranks, the data or Megatron.
        DataError: if there is too little data, or no end-of-document token that is needed.
    """
    for phase in plan.phases:
        check_names(phase.mixture, list(datasets.training_shards()), phase.mixture_key)
    eod_id = datasets.tokenizer.eod_id
    if eod_id is None and (data.document_mask or data.masks_eod_loss):
        raise DataError(
            "data.order=megatron finds the ends of documents by the end-of-document token, and the"
            f" tokenizer in {datasets.first.folder} names none: build the data with"
            " data.tokenizer.eod_token, or set data.document_mask and data.order.eod_mask_loss to false"
        )
    order = open_order(plan_order(data, datasets, plan))
    options = SampleOptions(eod_id, data.document_mask, data.masks_eod_loss)
    return MegatronLoader(order, options, plan.phases, dp_rank, dp_size)
