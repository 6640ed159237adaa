"""Validation in the training loop: the loss over held-out windows, all or a fixed sample."""

from __future__ import annotations

import math
from collections.abc import Iterator

from data_pipeline.loading.batch import Batch
from data_pipeline.loading.interface import Loader
from data_pipeline.loading.packing import Windows
from data_pipeline.loading.validation import validation_batches, windows_per_batch
from pretrain.config.recipe import ValidationConfig
from pretrain.config.timeline import Phase
from pretrain.core.errors import NonFiniteError
from pretrain.engine.engine import Engine
from pretrain.evaluation.call_dependence import call_dependence
from pretrain.guards.progress import Progress
from pretrain.training.records import RecordWriter, ValidationRecord
from pretrain.training.timing import StepTimer


class Validator:
    """Measures the validation loss. Every rank must call it alike.

    Args:
        windows: of the held-out data.
        loader: its data-parallel ranks share the windows.
    """

    def __init__(
        self,
        windows: Windows,
        engine: Engine,
        loader: Loader,
        config: ValidationConfig,
        writer: RecordWriter,
        timer: StepTimer,
    ) -> None:
        self._windows = windows
        self._engine = engine
        self._loader = loader
        self._config = config
        self._writer = writer
        self._timer = timer

    def enter(self, phase: Phase) -> None:
        """Use windows as long as the sequences of a phase."""
        length = phase.recipe.train.sequence_length
        if self._windows.sequence_length != length:
            self._windows = self._windows.of_length(length)

    def is_due(self, step: int) -> bool:
        """Whether the interval ends; the ends of epochs, phases and runs are validated too."""
        interval = self._config.interval_steps
        return interval > 0 and step % interval == 0

    def sample(self, progress: Progress) -> float:
        """Return the loss (nats a target) over ``validation.max_windows``, always the same ones."""
        return self._measure(progress, self._config.max_windows)

    def rest(self, progress: Progress) -> None:
        """At the end of a run, measure over ``final_windows`` too, if the sample has fewer."""
        sample, final = self._config.max_windows, self._config.final_windows
        num_all = self._windows.num_all
        if sample is not None and sample < (num_all if final is None else min(final, num_all)):
            self._measure(progress, final)

    def _measure(self, progress: Progress, max_windows: int | None) -> float:
        with self._timer.paused("validation"):
            nll, targets = self._engine.evaluate(self.batches(max_windows))
            # Sums over all ranks: shards of unequal size have no mean of means.
            loss = nll / targets
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the validation loss of step {progress.step} is not finite: "
                    "lower optimizer.learning_rate; the last checkpoint is intact"
                )
            progress.note_validation(loss, targets)
            self._writer.write(
                ValidationRecord(self._writer.position(progress.step), loss, targets)
            )
        return loss

    def batches(self, max_windows: int | None) -> Iterator[Batch]:
        """This rank's batches: without gradients more sequences fit than those of a micro batch."""
        recipe, loader = self._engine.phase_recipe, self._loader
        # The micro batch of the phase: a longer sequence may need a smaller one.
        size = recipe.train.micro_batch_size
        if call_dependence(recipe.model) is None:
            tokens = max(self._config.batch_tokens, size * self._windows.sequence_length)
            size = windows_per_batch(self._windows, loader.dp_size, max_windows, tokens)
        return validation_batches(self._windows, size, loader.dp_rank, loader.dp_size, max_windows)
