"""When a run saves, what it saves in addition to weights and optimizer, and how it continues."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from data_pipeline.loading.interface import Loader
from pretrain.checkpoint.layout import BEST, EPOCH, step_folder
from pretrain.checkpoint.state import CardFacts, CheckpointState, Fingerprint, RankState
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.recipe import CheckpointConfig
from pretrain.config.timeline import Timeline
from pretrain.core.errors import GuardError, NonFiniteError, PeerLostError, is_peer_loss
from pretrain.engine.pending import from_state, regroup, to_state
from pretrain.guards.detect import GuardState, Violation
from pretrain.guards.policy import GuardPolicy
from pretrain.guards.progress import Progress
from pretrain.training.metrics import MetricsRecorder
from pretrain.training.stopping import Stopping
from pretrain.training.timing import StepTimer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunParts:
    """The parts of a run whose state a checkpoint carries."""

    timeline: Timeline
    loader: Loader
    guards: GuardPolicy
    metrics: MetricsRecorder
    timer: StepTimer


class EndedParts:
    """Epochs and phases that have ended and are in no checkpoint yet.

    They may wait, because nothing is saved while steps are being skipped.

    Attributes:
        is_due: whether there are any.
    """

    def __init__(self, timeline: Timeline, loader: Loader, keep_epochs: bool) -> None:
        self._timeline = timeline
        self._loader = loader
        self._keep_epochs = keep_epochs
        # Passes over the training split that are done.
        self._epoch = 0
        self._epoch_is_due = False
        self.is_due = False

    def resume(self, step: int) -> None:
        """Begin after ``step`` steps, which are saved."""
        self._epoch = int(self._loader.epochs(step) or 0)
        self._epoch_is_due = False
        self.is_due = False

    def note_step(self, step: int) -> bool:
        """Note which phase or kept epoch ends with a step, and return whether any does.

        An epoch that a rollback passed over counts as well.
        """
        ends = self._timeline.ends_phase(step)
        if self._keep_epochs:
            before = self._epoch
            self._epoch = int(self._loader.epochs(step) or 0)
            self._epoch_is_due |= self._epoch > before
            ends |= self._epoch > before
        self.is_due |= ends
        return ends

    def saved(self, progress: Progress) -> None:
        """Note that a checkpoint is being written; it is that of an epoch that has ended."""
        if self._epoch_is_due:
            progress.epoch_steps[str(self._epoch)] = progress.step
        self._epoch_is_due = False
        self.is_due = False


class Checkpoints:
    """Saves a run and restores it. Every rank must call it alike.

    Args:
        fingerprint: what must be the same for a checkpoint to be resumed.
        card_facts: what a model card says in addition to recipe and progress.
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: CheckpointConfig,
        parts: RunParts,
        stopping: Stopping,
        fingerprint: Fingerprint,
        card_facts: CardFacts,
    ) -> None:
        self.store = store
        self.fingerprint = fingerprint
        self.ended = EndedParts(parts.timeline, parts.loader, config.keep_epochs)
        self._config = config
        self._parts = parts
        self._stopping = stopping
        self._card_facts = card_facts
        # The checkpoint of another run that this run began with.
        self._parent: Path | None = None

    def is_due(self, progress: Progress, is_best: bool) -> bool:
        """Whether a step that is not the last one is to be saved.

        While steps are being skipped nothing is: the weights are those of an earlier step, and a
        rollback may soon need the older checkpoints.
        """
        due = (
            self.ended.is_due
            or progress.step % self._config.interval_steps == 0
            or (is_best and self._config.keep_best)
        )
        return due and not progress.skipped_in_a_row

    def save(self, progress: Progress, waits: bool) -> None:
        """Write a checkpoint of the step that is done.

        Args:
            waits: until it is published, also if ``checkpoint.background`` is on.

        Raises:
            DataError: if the data that the weights were trained on are damaged.
            NonFiniteError: if its weights are not finite.
            StorageError: if it cannot be written.
        """
        parts = self._parts
        with parts.timer.paused("saving"), self._stopping.saving():
            # Both are collective, and end the run on every rank before a file is written.
            self._stopping.finish_data_check()
            if not parts.metrics.engine.weights_are_finite():
                raise NonFiniteError(
                    f"the weights after step {progress.step} are not finite: "
                    "lower optimizer.learning_rate; the last checkpoint is intact"
                )
            # Before the state is made: the progress names the step of each kept epoch.
            self.ended.saved(progress)
            rank_state: RankState = {
                "pending": to_state(parts.metrics.pending),
                "row_seconds": parts.timer.window_seconds(),
            }
            self.store.save(
                progress.step,
                self._state(progress),
                self._pointers(progress),
                rank_state,
                background=self._config.background and not waits,
            )
        parts.metrics.goodput.note(progress)

    @contextmanager
    def published(self) -> Iterator[None]:
        """Leave the block only after what was saved in it is published.

        An error that ends the block comes before one of saving.
        """
        try:
            yield
        except PeerLostError:
            # A rank that is gone cannot write its part.
            raise
        except Exception as error:
            if not is_peer_loss(error):
                try:
                    self.store.finish()
                except Exception:
                    logger.exception("the last checkpoint was not written")
            raise
        self.store.finish()

    def load(self, checkpoint: Path) -> Progress:
        """Continue from a whole checkpoint of this run, or of the one that it branches from."""
        parts = self._parts
        loaded = self.store.load(checkpoint)
        state = loaded.state
        rank_states = loaded.rank_states
        progress = Progress(**state["progress"])
        # A checkpoint elsewhere is the parent run's, which this run branches from.
        if checkpoint.parent != self.store.folder:
            self._parent = checkpoint
            progress.leave_parent_run()
        if self._config.keep_best and not self._has(progress.best_step):
            # A rollback may have removed the best checkpoint, and a run without keep_best has none.
            progress.forget_best()
        # The loader refuses data that are not the checkpoint's.
        parts.loader.resume(state["data"], progress.step)
        topology = parts.metrics.engine.topology
        pending = [own.get("pending", []) for own in rank_states]
        # Other ranks than those that have saved share what all of those saw.
        is_same = loaded.ranks == topology.world_size
        mine = pending[0] if is_same else regroup(pending, topology.world_size)
        parts.metrics.pending = from_state(mine, topology.device)
        parts.timer.resume(max(own.get("row_seconds", 0.0) for own in rank_states))
        self.ended.resume(progress.step)
        parts.guards.restore(cast(GuardState, state.get("guards", {})))
        if progress.stopped_early:
            # The recipe may allow more patience now.
            progress.stopped_early = parts.guards.ends_early(progress)
        logger.info("resumed from %s", checkpoint)
        return progress

    def go_back(self, violation: Violation) -> Path:
        """Remove the checkpoints after an incident, and return the newest one before it.

        Raises:
            GuardError: if there is none.
        """
        checkpoint = self.store.go_back(violation.from_step, self._parent)
        if checkpoint is None:
            raise GuardError(
                f"step {violation.step}: {violation.reason}, and there is no checkpoint before it "
                "to go back to: lower checkpoint.interval_steps"
            )
        return checkpoint

    def _has(self, step: int | None) -> bool:
        return step is not None and step_folder(self.store.folder, step).is_dir()

    def _state(self, progress: Progress) -> CheckpointState:
        """Return the content of ``state.json``."""
        parts = self._parts
        return {
            **self.fingerprint,
            **self._card_facts,
            "step": progress.step,
            "consumed_tokens": parts.timeline.tokens_after(progress.step),
            "epoch": parts.loader.epochs(progress.step),
            "validation_loss": progress.last_validation,
            "validation_step": progress.validation_step,
            "validation_targets": progress.validation_targets,
            # The phase of the last step: index step - 1, because steps count from 0 there.
            "phase": parts.timeline.at(progress.step - 1).name or None,
            "progress": asdict(progress),
            # Collective, if ranks read different parts of the data.
            "data": parts.loader.state(progress.step, parts.metrics.engine.topology.all_gather),
            "guards": {**parts.guards.state()},
        }

    def _pointers(self, progress: Progress) -> dict[str, int]:
        """Return the steps of the checkpoints that are kept, by the names of their pointers."""
        pointers: dict[str, int] = {}
        if self._config.keep_epochs:
            pointers = {f"{EPOCH}{epoch}": step for epoch, step in progress.epoch_steps.items()}
        if self._config.keep_best and progress.best_step is not None:
            pointers[BEST] = progress.best_step
        return pointers
