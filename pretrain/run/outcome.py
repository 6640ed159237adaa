"""How a run ended: its summary, what callbacks do at its end, and the sentences on the terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.checkpoint import layout
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import length_field
from pretrain.core.files import JsonObject
from pretrain.guards.incidents import INCIDENTS
from pretrain.model.sizes import model_size
from pretrain.run.folder import CHECKPOINTS, ENDED, read_summary, update_summary
from pretrain.training.trainer import Trainer


@dataclass(frozen=True)
class RunSummary:
    """A run as summary.json and ``--json`` describe it; the fields are the keys, in their order.

    Attributes:
        recipe: its name.
        train_tokens, steps: that are done.
        train_seconds: in steps, without validation and saving.
        stall_seconds: in which training waited for batches, in steps that the run has kept.
        goodput: share of the time since the first start that went into kept steps, and where the
            rest went (:meth:`pretrain.training.goodput.Account.goodput`); None before the first
            step.
        validation_loss_in_training: the newest one, nats a token.
        checkpoint: the pointer to the newest one.
        checkpoints: the checkpoints that have a name, by that name.
        done_already: whether there was nothing to do.
        attention_kernel, compiled: what the recipe's fields were on this device.
    """

    recipe: str
    train_tokens: int
    steps: int
    tokens_per_second: float | None
    train_seconds: float
    stall_seconds: float
    goodput: JsonObject | None
    parameters_total: int
    parameters_active: int
    validation_loss_in_training: float | None
    best_validation_loss: float | None
    best_step: int | None
    skipped_steps: int
    skipped_tokens: int
    rollbacks: int
    stopped_early: bool
    checkpoint: str
    checkpoints: dict[str, str]
    resumed_from_step: int
    done_already: bool
    attention_kernel: str
    compiled: str

    def to_dict(self) -> JsonObject:
        """Return it as JSON has it."""
        return asdict(self)


class Outcome:
    """The outcome of one start of a run. It must be made after the resume, and before training.

    Args:
        prints: whether rank 0 prints sentences; not if standard output is for JSON.

    Attributes:
        resumed_from: the step that this start began with.
        was_done: whether that was the last one.
        has_ended: whether the callbacks of the run's end were called too. A run that was killed
            between its last step and its end only needs that.
    """

    def __init__(self, trainer: Trainer, recipe: Recipe, prints: bool) -> None:
        self._trainer = trainer
        self._prints = prints and trainer.engine.topology.is_main
        self._recipe = recipe
        self._folder = Path(recipe.output_path)
        self.resumed_from = trainer.progress.step
        # Now, because training changes both.
        self.was_done = trainer.is_done
        self.has_ended = (
            self.was_done and read_summary(self._folder).get(ENDED) == self.resumed_from
        )

    def summary(self) -> RunSummary:
        """Return the summary of the run as it is now."""
        trainer = self._trainer
        recipe = self._recipe
        progress = trainer.progress
        size = model_size(recipe.model, recipe.train.sequence_length)
        tokens = trainer.timeline.tokens_after(progress.step)
        seconds = progress.train_seconds
        checkpoints = self._folder / CHECKPOINTS
        # The order of the fields is that of the file.
        return RunSummary(
            recipe=recipe.name,
            train_tokens=tokens,
            steps=progress.step,
            tokens_per_second=tokens / seconds if seconds else None,
            train_seconds=seconds,
            stall_seconds=progress.stall_seconds,
            goodput=trainer.metrics.goodput.measure(),
            parameters_total=size.parameters_total,
            parameters_active=size.parameters_active,
            validation_loss_in_training=progress.last_validation,
            best_validation_loss=progress.best_validation,
            best_step=progress.best_step,
            skipped_steps=progress.skipped_steps,
            skipped_tokens=progress.skipped_tokens,
            rollbacks=progress.rollbacks,
            stopped_early=progress.stopped_early,
            checkpoint=str(checkpoints / layout.LATEST),
            checkpoints=layout.pointers(checkpoints),
            resumed_from_step=self.resumed_from,
            done_already=self.was_done,
            attention_kernel=trainer.engine.model.config.attention.kernel,
            compiled=trainer.engine.compiled,
        )

    def complete(self, summary: RunSummary, finished: bool) -> None:
        """Write the summary, and call the callbacks of the end."""
        whole = update_summary(self._folder, summary.to_dict())
        self._trainer.callbacks.on_end(whole)
        # Callbacks may wait for a service and be killed meanwhile: then the next start repeats it.
        if finished:
            update_summary(self._folder, {ENDED: self._trainer.progress.step})

    def fail(self, error: Exception) -> None:
        """Report the error that ends the run to the callbacks; their own errors are only logged."""
        self._trainer.callbacks.on_failure(error)

    def announce(self) -> None:
        """Print what the run is about to do, if it resumes."""
        if self._prints and self.resumed_from and not self.was_done:
            print(f"resuming from step {self.resumed_from} of {self._trainer.num_steps}")

    def explain(self, summary: RunSummary, finished: bool) -> None:
        """Print how it went."""
        if self._prints:
            print("\n".join(self._sentences(summary, finished)))

    def _sentences(self, summary: RunSummary, finished: bool) -> list[str]:
        # Nothing was trained by this start.
        if self.was_done:
            return [self._done_already()]
        progress = self._trainer.progress
        if not finished:
            return [
                f"stopped and saved at step {progress.step} of {self._trainer.num_steps}: "
                "run the same command to continue from there"
            ]
        sentences = []
        if progress.stopped_early:
            sentences.append(
                "stopped early: the validation loss has not fallen for "
                f"{progress.stale_validations} validations"
            )
        if progress.skipped_steps:
            sentences.append(
                f"{progress.skipped_steps} of the steps were skipped, and their data not learned "
                f"from: see {self._folder / INCIDENTS} and the log"
            )
        loss = progress.last_validation
        validation = "no validation split" if loss is None else f"validation loss {loss:.4f}"
        sentences.append(
            f"finished {summary.steps:,} steps, {summary.train_tokens:,} tokens at "
            f"{summary.tokens_per_second:,.0f} tokens/s; {validation}; "
            f"everything is in {self._folder}"
        )
        return sentences

    def _done_already(self) -> str:
        stopped_early = self._trainer.progress.stopped_early
        more = "guards.early_stopping.patience" if stopped_early else length_field(self._recipe)
        return (
            f"done already: {self._folder} holds step {self.resumed_from} of "
            f"{self._trainer.num_steps}; raise {more} to continue, or use --fresh to start over"
        )
