"""The training loop, from top to bottom."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.loading.interface import Loader
from pretrain.callbacks.base import CallbackList
from pretrain.config.timeline import Phase, Timeline
from pretrain.core import faults
from pretrain.core.activity import ACTIVITY
from pretrain.engine.engine import Engine
from pretrain.guards.detect import Violation
from pretrain.guards.policy import GuardPolicy
from pretrain.guards.progress import Progress
from pretrain.training.checkpointing import Checkpoints
from pretrain.training.metrics import MetricsRecorder
from pretrain.training.schedules import Schedules
from pretrain.training.stopping import Stopping
from pretrain.training.timing import StepTimer
from pretrain.training.validation import Validator

logger = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Runs a recipe to its end, from step 0 or from the checkpoint that was resumed.

    Attributes:
        validator: None without held-out data; the run then has no validation loss and no best
            checkpoint.
    """

    timeline: Timeline
    schedules: Schedules
    engine: Engine
    loader: Loader
    guards: GuardPolicy
    metrics: MetricsRecorder
    validator: Validator | None
    checkpoints: Checkpoints
    stopping: Stopping
    timer: StepTimer
    callbacks: CallbackList
    progress: Progress = field(default_factory=Progress)
    # The phase that the engine is in.
    _phase: Phase | None = None

    @property
    def num_steps(self) -> int:
        """Steps of the run: fewer than planned once early stopping has ended it."""
        return self.progress.step if self.progress.stopped_early else self.timeline.num_steps

    @property
    def is_done(self) -> bool:
        """Whether the last step was taken."""
        return self.progress.step >= self.num_steps

    def fit(self) -> bool:
        """Train, and return whether the last step was taken; a request to stop saves first."""
        self.callbacks.on_start(self.progress.step, self.num_steps)
        self.metrics.start(self.progress)
        self.timer.start()
        # Damage in what the loader has read before the first step.
        self.stopping.raise_data_faults()
        # The end of publishing, which may take long, is outside of what must make progress.
        with self.checkpoints.published(), ACTIVITY.running():
            return self._loop()

    def _loop(self) -> bool:
        # Every rank takes the same branches: most of these calls hold collectives.
        while not self.is_done:
            if not self._step():
                continue
            self._record()
            ends_part = self.checkpoints.ended.note_step(self.progress.step)
            is_best = self._validate(ends_part)
            ACTIVITY.note(f"the end of step {self.progress.step}")
            # Asked after the last step too: it ends the run if data are damaged.
            stopped = self.stopping.requested() and not self.is_done
            if self.is_done or stopped or self.checkpoints.is_due(self.progress, is_best):
                with ACTIVITY.pause(f"saving step {self.progress.step}"):
                    self.checkpoints.save(self.progress, waits=self.is_done or stopped)
            if stopped:
                return False
        return True

    def _step(self) -> bool:
        """Take one optimizer step; False if the run went back to a checkpoint instead."""
        faults.reached("step.begin")
        step = self.progress.step
        with self.timer.step(self.progress):
            ACTIVITY.note(f"step {step + 1}")
            self._enter_phase(step)
            # Slow storage is reported by a guard; it is no hang.
            with ACTIVITY.pause(f"waiting for the data of step {step + 1}"):
                batches = self.loader.step_batches(step)
            # Guards and records count steps from 1, the engine and the data from 0.
            self.guards.begin_step(step + 1)
            factor, balance_rate = self.schedules.at(step)
            factor *= self.progress.learning_rate_factor
            result = self.engine.train_step(batches, factor, balance_rate, self.guards.should_skip)
            # A skipped step counts too: schedule and data follow the step's number.
            self.progress.step += 1
        self.metrics.add(result)
        violation = self.guards.after_step(self.progress, batches, result)
        if violation is not None:
            self._roll_back(violation)
        return violation is None

    def _record(self) -> None:
        """Report the step, and make the records that are due."""
        step = self.progress.step
        ACTIVITY.note(f"the records and callbacks of step {step}")
        self.callbacks.on_step(step)
        self.metrics.record(self.progress, self.is_done or self.timeline.ends_phase(step))

    def _validate(self, ends_part: bool) -> bool:
        """Validate if it is due, and return whether the loss is the best so far.

        Early stopping ends the run here.

        Args:
            ends_part: whether a kept epoch or a phase ends with the step.
        """
        validator = self.validator
        if validator is None:
            return False
        if not (self.is_done or ends_part or validator.is_due(self.progress.step)):
            return False
        ACTIVITY.note(f"the validation after step {self.progress.step}")
        # A sample first: it is what all validations of the run have in common.
        loss = validator.sample(self.progress)
        if not self.is_done:
            self.guards.after_validation(self.progress, loss, self.metrics.training_loss)
        is_best = self.progress.note_best(loss)
        if not self.is_done and self.guards.ends_early(self.progress):
            self._end_early()
        # Early stopping may have made this the last step.
        if self.is_done:
            validator.rest(self.progress)
        return is_best

    def _end_early(self) -> None:
        """Make the step that was just taken the last one, and write its record."""
        self.progress.stopped_early = True
        self.callbacks.on_early_end(self.progress.step)
        self.metrics.record_training(self.progress)

    def _enter_phase(self, step: int) -> None:
        """Enter the phase of a step (from 0), at its beginning or, after a resume, inside it."""
        phase = self.timeline.at(step)
        if phase is self._phase:
            return
        self._phase = phase
        self.engine.enter(phase)
        self.metrics.enter(phase)
        if self.validator is not None:
            self.validator.enter(phase)
        # Losses over windows of two lengths do not compare: long contexts help a prediction.
        if self.timeline.changes_length(step):
            self.progress.forget_other_lengths()
        if step == phase.first_step:
            self.guards.forget()
        if phase.name:
            logger.info("%s", phase)

    def resume(self, checkpoint: Path) -> None:
        """Continue from a whole checkpoint of this run, or of the one that it branches from."""
        self.progress = self.checkpoints.load(checkpoint)
        # DeepSpeed's counters are the checkpoint's now, so the phase has to be entered again.
        self._phase = None

    def _roll_back(self, violation: Violation) -> None:
        """Go back to the newest checkpoint before the incident, and continue with later data."""
        ACTIVITY.note(f"going back from step {self.progress.step}")
        before = self.progress
        rollback = self.guards.config.rollback
        # Hashing and reading a large checkpoint takes as long as it takes.
        with ACTIVITY.pause("going back to a checkpoint"):
            checkpoint = self.checkpoints.go_back(violation)
            # Before the loader is set back: the data up to here, and a little more, are passed
            # over.
            consumed = self.loader.consumed(before.step + rollback.skip_steps)
            self.resume(checkpoint)
        self.progress.take_over_counts(before, rollback.learning_rate_factor)
        self.guards.report_rollback(self.progress)
        self.loader.pass_over(self.progress.step, consumed)
        self.loader.require(self.num_steps)
        self.metrics.restart(self.progress.step)
        self.timer.start()
        self.callbacks.on_rollback(self.progress.step)
