"""Where guards meet a run: what they find is told, and done, the same on every rank."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.loading.batch import Batch
from pretrain.config.guards import GuardConfig
from pretrain.core.errors import GuardError, NonFiniteError, PipelineError
from pretrain.engine.engine import Engine, Judge, StepResult
from pretrain.guards.detect import Guards, Violation, severest
from pretrain.guards.incidents import IncidentLog
from pretrain.guards.locate import NonFinite, find_non_finite

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a run is at; saved in each checkpoint and restored from it.

    Attributes:
        skipped_steps: all that left the weights as they were, those of fp16's loss scale too.
        skipped_in_a_row: since a step was applied, without those after which fp16's loss scale fell.
        stale_validations: since ``patience_loss``, the lowest validation loss that counted as a new best for early stopping.
        stopped_early: whether the run ended because of it.
        skipped_tokens: of the ``skipped_steps``.
        last_validation, validation_step, validation_targets: the newest validation loss, and the step and the number of targets that it is of.
        best_validation, best_step: of the validations that read what ``validation.max_windows`` allows.
        epoch_steps: with ``checkpoint.keep_epochs``, the step whose checkpoint each epoch ended with.
    """

    step: int = 0
    skipped_steps: int = 0
    skipped_tokens: int = 0
    skipped_in_a_row: int = 0
    train_seconds: float = 0.0
    last_validation: float | None = None
    validation_step: int | None = None
    validation_targets: int | None = None
    best_validation: float | None = None
    best_step: int | None = None
    rollbacks: int = 0
    patience_loss: float | None = None
    stale_validations: int = 0
    stopped_early: bool = False
    epoch_steps: dict[str, int] = field(default_factory=dict)

    def forget_best(self) -> None:
        """The next validation is the best one."""
        self.best_validation = self.best_step = None

    def forget_patience(self) -> None:
        """Early stopping begins anew."""
        self.patience_loss, self.stale_validations, self.stopped_early = None, 0, False


class GuardPolicy:
    """Asks the guards about each step, tells what they find, and stops the run where they say so.

    Attributes:
        judge: for :meth:`Engine.train_step`; None where no guard may refuse an update.
    """

    def __init__(self, config: GuardConfig, engine: Engine, incidents: IncidentLog) -> None:
        self.config, self.engine, self.incidents = config, engine, incidents
        self.guards = Guards(config)
        self.judge: Judge | None = self._judge if self.guards.judges else None
        self._step, self._loss_scale = 0, 1.0
        self._trips: list[Violation] = []

    def begin_step(self, step: int) -> None:
        """Step ``step`` (from 1) starts."""
        self._step, self._trips, self._loss_scale = step, [], self.engine.loss_scale()

    def _judge(self, loss: float, grad_norm: float) -> bool:
        self._trips = self.guards.look(self._step, loss, grad_norm)
        worst = severest(self._trips)
        return worst is not None and worst.action != "warn"

    def after_step(
        self, progress: Progress, batches: list[Batch], result: StepResult
    ) -> Violation | None:
        """Counts a step that was skipped, and tells and does what the guards say. Every rank must call it.

        Returns:
            What the run has to go back for, if anything.

        Raises:
            NonFiniteError: where the run has to stop for numbers that are not finite.
            GuardError: where it has to stop for another reason.
        """
        found: list[NonFinite] | None = None
        if not result.applied:
            progress.skipped_steps += 1
            progress.skipped_tokens += self.engine.now.train.tokens_per_step
        if not result.applied and not result.refused:
            found = find_non_finite(self.engine, batches)
            if not found and self.engine.precision == "fp16":
                self._overflowed(progress)
                return None
            self._trips.append(self.guards.non_finite(progress.step))
        progress.skipped_in_a_row = 0 if result.applied else progress.skipped_in_a_row + 1
        for violation in self._trips:
            self.incidents.tell_step(
                violation, result, found if violation.guard == "non_finite" else None
            )
        return self._act(progress, self._trips)

    def after_losses(
        self, last_step: int, results: Sequence[StepResult], losses: Sequence[float]
    ) -> None:
        """Looks at the steps up to ``last_step`` where they were not judged before their update.

        Args:
            results: of these steps.
            losses: the mean cross-entropy of those that were applied, over all ranks.
        """
        if self.judge is not None:
            return
        first = last_step - len(results) + 1
        applied = [
            (first + place, result) for place, result in enumerate(results) if result.applied
        ]
        for (step, result), loss in zip(applied, losses, strict=True):
            for violation in self.guards.look(step, loss, result.grad_norm):
                self.incidents.tell_step(violation, result)

    def after_validation(
        self, progress: Progress, loss: float, training_loss: float | None
    ) -> None:
        """Compares with the training loss, and counts validations for early stopping.

        Raises:
            GuardError: where the validation loss is too far above.
        """
        violation = self.guards.validation_gap(progress.step, loss, training_loss)
        if violation is not None:
            self.incidents.tell(violation, validation_loss=loss, training_loss=training_loss)
            self._act(progress, [violation])
        stopping = self.config.early_stopping
        if stopping is None:
            return
        if progress.patience_loss is None or loss < progress.patience_loss - stopping.min_delta:
            progress.patience_loss, progress.stale_validations = loss, 0
        else:
            progress.stale_validations += 1

    def ends_early(self, progress: Progress) -> bool:
        """Whether the validation loss has not fallen for as many validations as the recipe has patience for."""
        stopping = self.config.early_stopping
        return stopping is not None and progress.stale_validations >= stopping.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries, as JSON."""
        return self.guards.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.guards.restore(state)

    def _overflowed(self, progress: Progress) -> None:
        """fp16's loss scale was too high for the step. It falls for that only so often: where it did not, the step is skipped like any other."""
        scale = self.engine.loss_scale()
        logger.info(
            "step %d overflowed and was skipped; fp16's loss scale is now %g", progress.step, scale
        )
        progress.skipped_in_a_row += scale == self._loss_scale
        if progress.skipped_in_a_row > self.config.max_skipped_in_a_row:
            raise NonFiniteError(
                f"{progress.skipped_in_a_row} steps in a row up to step {progress.step} were skipped, the last one because it overflows in fp16 at a "
                f"loss scale of {scale:g}, which does not fall: set fp16.loss_scale to 0 in the ds_config, lower its fp16.min_loss_scale, or use "
                "--set train.precision=bf16; the last checkpoint is intact"
            )

    def _act(self, progress: Progress, violations: list[Violation]) -> Violation | None:
        worst = severest(violations)
        if worst is None or worst.action == "warn":
            return None
        if worst.action == "stop":
            raise self._error(
                worst, f"step {worst.step}: {worst.reason}, and guards.{worst.guard}.action is stop"
            )
        if worst.action == "rollback":
            if progress.rollbacks < self.config.rollback.max_times:
                return worst
            raise self._error(
                worst,
                f"step {worst.step}: {worst.reason}, and the run went back {progress.rollbacks} times already",
            )
        if progress.skipped_in_a_row > self.config.max_skipped_in_a_row:
            raise self._error(
                worst,
                f"{progress.skipped_in_a_row} steps in a row up to step {worst.step} were skipped, the last one because {worst.reason}",
            )
        return None

    def _error(self, violation: Violation, what: str) -> PipelineError:
        """Where to look, and what to do; a run that is started again goes on from a checkpoint that is intact."""
        kind = NonFiniteError if violation.guard == "non_finite" else GuardError
        return kind(
            f"{what}: lower optimizer.learning_rate, or look at the data that {self.incidents.path} names; the last checkpoint is intact"
        )
