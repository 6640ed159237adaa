"""Connects guards to a run: what they find is reported and acted on, the same on every rank."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from data_pipeline.loading.batch import Batch
from pretrain.config.guards import GuardConfig
from pretrain.core.errors import GuardError, NonFiniteError, PipelineError
from pretrain.engine.engine import Engine
from pretrain.engine.step import MeanLosses, ShouldSkip, StepResult
from pretrain.guards.detect import Guards, GuardState, Violation, severest
from pretrain.guards.incidents import IncidentLog
from pretrain.guards.locate import NonFinite, find_non_finite
from pretrain.guards.progress import Progress

logger = logging.getLogger(__name__)


class GuardPolicy:
    """Shows each step to the guards, reports what they find, and acts on it.

    Attributes:
        should_skip: for :meth:`Engine.train_step`; None if no guard may refuse an update.
    """

    def __init__(self, config: GuardConfig, engine: Engine, incidents: IncidentLog) -> None:
        self.config = config
        self.engine = engine
        self.incidents = incidents
        self.guards = Guards(config)
        # Without a guard that may skip, the engine need not reduce losses before the update.
        self.should_skip: ShouldSkip | None = self._refuses if self.guards.may_skip else None
        self._step = 0
        self._loss_scale = 1.0
        self._violations: list[Violation] = []

    def begin_step(self, step: int) -> None:
        """Begin step ``step`` (from 1)."""
        self._step = step
        self._violations = []
        self._loss_scale = self.engine.loss_scale.value()

    def _refuses(self, loss: float, grad_norm: float) -> bool:
        """Whether an update must not happen; the engine calls it with means over all ranks."""
        self._violations = self.guards.look(self._step, loss, grad_norm)
        worst = severest(self._violations)
        return worst is not None and worst.action != "warn"

    def after_step(
        self, progress: Progress, batches: list[Batch], result: StepResult
    ) -> Violation | None:
        """Count a step that was skipped, report what the guards have found, and act on it.

        Every rank must call it.

        Returns:
            The violation that the run has to go back for; None if there is none.

        Raises:
            NonFiniteError: if the run has to stop because a value is not finite.
            GuardError: if it has to stop for another reason.
        """
        # None: nobody searched. Empty: the repeated step was finite.
        found: list[NonFinite] | None = None
        if not result.applied:
            progress.skipped_steps += 1
            progress.skipped_tokens += self.engine.phase_recipe.train.tokens_per_step
        # Skipped by the optimizer, not by a guard: a loss or gradient is not finite.
        if not result.applied and not result.refused:
            found = find_non_finite(self.engine, batches)
            # Without the scale everything is finite: fp16's loss scale was too large.
            if not found and self.engine.precision == "fp16":
                self._overflowed(progress)
                return None
            self._violations.append(self.guards.non_finite(progress.step))
        progress.skipped_in_a_row = 0 if result.applied else progress.skipped_in_a_row + 1
        for violation in self._violations:
            where = found if violation.guard == "non_finite" else None
            self.incidents.report_step(violation, result, where)
        return self._act(progress, self._violations)

    def report_rollback(self, progress: Progress) -> None:
        """Say where a rollback has gone to, and what it makes of the learning rate."""
        self.incidents.report_rollback(
            progress.step,
            progress.learning_rate_factor
            if self.config.rollback.learning_rate_factor != 1.0
            else None,
        )

    def after_losses(
        self, last_step: int, results: Sequence[StepResult], losses: Sequence[MeanLosses]
    ) -> None:
        """Show the steps up to ``last_step`` to the guards, unless they saw them before the update.

        Args:
            results: of these steps.
            losses: of those that were applied, means over all ranks.
        """
        if self.should_skip is not None:
            return
        # Skipped steps have a number and no mean.
        first = last_step - len(results) + 1
        applied = [
            (first + place, result) for place, result in enumerate(results) if result.applied
        ]
        for (step, result), mean in zip(applied, losses, strict=True):
            for violation in self.guards.look(step, mean.cross_entropy, result.grad_norm):
                self.incidents.report_step(violation, result)

    def after_validation(
        self, progress: Progress, loss: float, training_loss: float | None
    ) -> None:
        """Compare with the training loss, and count validations for early stopping.

        Raises:
            GuardError: if the validation loss is too far above.
        """
        violation = self.guards.validation_gap(progress.step, loss, training_loss)
        if violation is not None:
            self.incidents.report(violation, validation_loss=loss, training_loss=training_loss)
            self._act(progress, [violation])
        if self.config.early_stopping is not None:
            progress.note_patience(loss, self.config.early_stopping.min_delta)

    def ends_early(self, progress: Progress) -> bool:
        """Whether the validation loss has not fallen for as long as the recipe's patience."""
        stopping = self.config.early_stopping
        return stopping is not None and progress.stale_validations >= stopping.patience

    def state(self) -> GuardState:
        """Return what a checkpoint carries, as JSON."""
        return self.guards.state()

    def restore(self, state: GuardState) -> None:
        """Continue from what a checkpoint carries."""
        self.guards.restore(state)

    def forget(self) -> None:
        """Start anew: losses and norms of other batches, lengths and data are no measure."""
        self.guards.restore({})

    def _overflowed(self, progress: Progress) -> None:
        """Note a step for which fp16's loss scale was too high, and should have fallen.

        The scale has a lower bound. If it did not fall, the step counts as skipped like any other.
        """
        scale = self.engine.loss_scale.value()
        logger.info(
            "step %d overflowed and was skipped; fp16's loss scale is now %g", progress.step, scale
        )
        # A bool counts as 0 or 1.
        progress.skipped_in_a_row += scale == self._loss_scale
        if progress.skipped_in_a_row > self.config.max_skipped_in_a_row:
            raise NonFiniteError(
                f"{progress.skipped_in_a_row} steps in a row up to step {progress.step} were "
                "skipped, the last one because it overflows in fp16 at a loss scale of "
                f"{scale:g}, which does not fall: "
                "set fp16.loss_scale to 0 in the ds_config, lower its fp16.min_loss_scale, or use "
                "--set train.precision=bf16; the last checkpoint is intact"
            )

    def _act(self, progress: Progress, violations: list[Violation]) -> Violation | None:
        """Do what the severest violation asks for; return it if the run has to go back."""
        worst = severest(violations)
        if worst is None or worst.action == "warn":
            return None
        if worst.action == "stop":
            built_in = worst.guard in GuardConfig.model_fields
            field = worst.guard if built_in else f"more ({worst.guard})"
            raise self._error(
                worst, f"step {worst.step}: {worst.reason}, and guards.{field}.action is stop"
            )
        if worst.action == "rollback":
            # A run that comes back to the same incident again and again would never end.
            if progress.rollbacks < self.config.rollback.max_times:
                return worst
            raise self._error(
                worst,
                f"step {worst.step}: {worst.reason}, "
                f"and the run went back {progress.rollbacks} times already",
            )
        # What is left is "skip", which has happened already.
        if progress.skipped_in_a_row > self.config.max_skipped_in_a_row:
            raise self._error(
                worst,
                f"{progress.skipped_in_a_row} steps in a row up to step {worst.step} were skipped, "
                f"the last one because {worst.reason}",
            )
        return None

    def _error(self, violation: Violation, what: str) -> PipelineError:
        """Return the error that ends the run: it says where to look and what to do."""
        kind = NonFiniteError if violation.guard == "non_finite" else GuardError
        return kind(
            f"{what}: lower optimizer.learning_rate, or look at the data that "
            f"{self.incidents.path} names; the last checkpoint is intact"
        )
