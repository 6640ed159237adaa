"""How far a run is: counted by the training loop and the guards, saved in each checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far a run is; a checkpoint holds all of it, as JSON, and restores it.

    Attributes:
        step: optimizer steps that are done, skipped ones too.
        skipped_steps: all that left the weights unchanged, also those of fp16's loss scale.
        skipped_tokens: of the ``skipped_steps``.
        skipped_in_a_row: since the last step that was applied, without those after which fp16's
            loss scale fell.
        train_seconds: spent in steps, without validation and saving.
        stall_seconds: of these, spent waiting for batches.
        rolled_back_steps, rolled_back_seconds: that guards went back over, without
            ``stall_seconds``.
        last_validation, validation_step, validation_targets: the newest validation loss (nats a
            token), and the step and the number of targets that it is of.
        best_validation, best_step: of the validations over ``validation.max_windows``.
        rollbacks: how often the run went back to a checkpoint.
        learning_rate_factor: of all ``rollbacks``; the schedule's learning rate is multiplied by
            it.
        patience_loss: the lowest validation loss that counted as a new best for early stopping.
        stale_validations: since ``patience_loss``.
        stopped_early: whether the run ended because of them.
        epoch_steps: with ``checkpoint.keep_epochs``, the step whose checkpoint each epoch ended
            with.
    """

    step: int = 0
    skipped_steps: int = 0
    skipped_tokens: int = 0
    skipped_in_a_row: int = 0
    train_seconds: float = 0.0
    stall_seconds: float = 0.0
    rolled_back_steps: int = 0
    rolled_back_seconds: float = 0.0
    last_validation: float | None = None
    validation_step: int | None = None
    validation_targets: int | None = None
    best_validation: float | None = None
    best_step: int | None = None
    rollbacks: int = 0
    learning_rate_factor: float = 1.0
    patience_loss: float | None = None
    stale_validations: int = 0
    stopped_early: bool = False
    epoch_steps: dict[str, int] = field(default_factory=dict)

    def forget_best(self) -> None:
        """Make the next validation the best one."""
        self.best_validation = None
        self.best_step = None

    def forget_patience(self) -> None:
        """Let early stopping begin anew."""
        self.patience_loss = None
        self.stale_validations = 0
        self.stopped_early = False

    def forget_other_lengths(self) -> None:
        """Forget comparisons of losses that are over windows of another length from now on."""
        self.forget_best()
        self.forget_patience()

    def leave_parent_run(self) -> None:
        """Forget what belongs to the parent run: its best checkpoint, epochs, end and stalls."""
        self.forget_best()
        self.forget_patience()
        self.epoch_steps.clear()
        self.stall_seconds = 0.0
        self.rolled_back_steps = 0
        self.rolled_back_seconds = 0.0

    def note_validation(self, loss: float, targets: int) -> None:
        """Note the newest validation loss, of the step that is done."""
        self.last_validation = loss
        self.validation_step = self.step
        self.validation_targets = targets

    def note_best(self, loss: float) -> bool:
        """Return whether a validation loss is the best so far, and remember it if it is.

        While steps are being skipped nothing is saved, and so nothing is the best.
        """
        # keep_best would otherwise name a step that has no checkpoint.
        is_best = not self.skipped_in_a_row and (
            self.best_validation is None or loss < self.best_validation
        )
        if is_best:
            self.best_validation = loss
            self.best_step = self.step
        return is_best

    def note_patience(self, loss: float, min_delta: float) -> None:
        """Count a validation for early stopping."""
        # Not ``best_validation``: a best by less than min_delta is saved, and no reason to wait.
        if self.patience_loss is None or loss < self.patience_loss - min_delta:
            self.patience_loss = loss
            self.stale_validations = 0
        else:
            self.stale_validations += 1

    def take_over_counts(self, before: Progress, learning_rate_factor: float) -> None:
        """After a rollback, keep the counts of what the undone steps have spent.

        Args:
            learning_rate_factor: of this rollback.
        """
        # Otherwise a run could go back for ever, each time from the checkpoint's count.
        self.rollbacks = before.rollbacks + 1
        # The checkpoint may be older than a rollback before this one.
        self.learning_rate_factor = before.learning_rate_factor * learning_rate_factor
        self.rolled_back_steps = before.rolled_back_steps + before.step - self.step
        self.rolled_back_seconds = before.rolled_back_seconds + (
            before.train_seconds - before.stall_seconds - self.train_seconds + self.stall_seconds
        )
        self.train_seconds = before.train_seconds
        self.stall_seconds = before.stall_seconds
        self.skipped_steps = before.skipped_steps
        self.skipped_tokens = before.skipped_tokens
