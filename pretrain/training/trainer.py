"""The training loop, from top to bottom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.loading.packing import Windows
from data_pipeline.loading.shard_loader import Loader, validation_batches
from data_pipeline.shards.verification import BackgroundCheck
from pretrain.analysis.expert_usage import UsageWindow, usage_columns
from pretrain.callbacks.base import Callback, Row
from pretrain.checkpoint.layout import BEST, EPOCH, step_folder
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Phase, Timeline
from pretrain.core.errors import DataError, GuardError, NonFiniteError
from pretrain.core.signals import StopRequest
from pretrain.engine.engine import Engine, StepResult, reduce_steps
from pretrain.engine.pending import from_state, to_state
from pretrain.guards.detect import Violation
from pretrain.guards.incidents import IncidentLog
from pretrain.guards.policy import GuardPolicy, Progress
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import RouterTotals
from pretrain.model.moe.losses import ALWAYS_COMPUTED, LOSSES, loss_weights
from pretrain.model.sizes import model_size
from pretrain.training.schedules import balance_update_rate, run_learning_rate_factor

logger = logging.getLogger(__name__)

# What a step's losses are called in a row; the last is there with multi-token prediction only.
LOSS_COLUMNS = ("loss", "total_loss", "multi_token_loss")


class Trainer:
    """Runs a recipe to its end, from the newest checkpoint if there is one.

    Args:
        validation: what is held out; without it the run has no validation loss and no best checkpoint.
        identity: fingerprints and topology that go into each checkpoint's state.
        facts: what else its model card says: ``parameters`` and ``sources``.
        peak: the device's FLOP/s, for MFU; None where it is not known.
        callbacks: empty on every rank but 0.
        data_check: what this rank still compares of the data with its manifest.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        loader: Loader,
        validation: Windows | None,
        store: CheckpointStore,
        identity: dict[str, Any],
        facts: dict[str, Any],
        callbacks: Sequence[Callback],
        stop: StopRequest,
        peak: float | None,
        data_check: BackgroundCheck,
    ) -> None:
        self.recipe, self.engine, self.loader, self.validation, self.store = (
            recipe,
            engine,
            loader,
            validation,
            store,
        )
        self.identity, self.facts, self.callbacks, self.stop = identity, facts, callbacks, stop
        self.peak, self.topology = peak, engine.topology
        self.timeline = Timeline(recipe)
        self.num_steps = self.timeline.num_steps
        self.data_check, self._data_is_checked = data_check, False
        self._stage: Phase | None = None  # the one that the engine is in
        self._trunk: Path | None = None  # another run's checkpoint that this one began with
        self._flops_per_token = 0.0
        self.progress = Progress()
        incidents = IncidentLog(Path(recipe.output_path), loader, engine.topology)
        self.supervisor = GuardPolicy(recipe.guards, engine, incidents)
        loader.waiting.watch(recipe.guards.stalled_data, incidents.tell_stall)
        self._training_loss: float | None = None  # of the last row
        self._pending: list[StepResult] = []  # steps that are in no row yet
        self._row_started = self._row_seconds = (
            0.0  # the clock when the first of them began, and what they took before a resume
        )
        self._usage_started = 0  # the step after which the window of expert usage began
        self._epoch = 0  # passes over the training split that are done
        self._part_is_due = False  # whether an epoch or phase has ended and is not saved
        self._epoch_is_due = False

    def resume(self, checkpoint: Path) -> None:
        """Goes on from a whole checkpoint of this run, or of the one that it branches from."""
        state = self.store.load(checkpoint)
        self._stage = (
            None  # DeepSpeed's counters are the checkpoint's now: the engine enters its phase anew
        )
        self.progress = Progress(**state["progress"])
        if checkpoint.parent != self.store.folder:
            self._trunk = checkpoint
            # Its best checkpoint and those of its epochs lie elsewhere, and its end was another.
            self.progress.forget_best()
            self.progress.forget_patience()
            self.progress.epoch_steps.clear()
        best = self.progress.best_step
        if (
            self.recipe.checkpoint.keep_best
            and best is not None
            and not step_folder(self.store.folder, best).is_dir()
        ):
            self.progress.forget_best()  # a run that went back has lost it, one that did not keep it never had it
        self.loader.resume(state["data"], self.progress.step)
        own = state["own"]
        self._pending, self._row_seconds = (
            from_state(own.get("pending", []), self.topology.device),
            own.get("row_seconds", 0.0),
        )
        self._epoch, self._part_is_due, self._epoch_is_due = (
            int(self.loader.epochs(self.progress.step) or 0),
            False,
            False,
        )
        self.supervisor.restore(state.get("guards", {}))
        if self.progress.stopped_early:
            # The recipe may have more patience now.
            self.progress.stopped_early = self.supervisor.ends_early(self.progress)
            self.num_steps = self.progress.step if self.progress.stopped_early else self.num_steps
        logger.info("resumed from %s", checkpoint)

    def fit(self) -> bool:
        """Trains until the last step, or until a stop is requested on any rank: then it saves and returns False."""
        recipe = self.recipe
        for callback in self.callbacks:
            callback.on_start(self.progress.step, self.num_steps)
        self._row_started = time.perf_counter() - self._row_seconds
        self._usage_started = self.progress.step
        stopped = False
        self._agree_on_data()  # of what was read before the first step
        while self.progress.step < self.num_steps and not stopped:
            if not self._step():
                continue
            step, last, best = self.progress.step, self.progress.step == self.num_steps, False
            ends_phase = self.timeline.ends_phase(step)
            for callback in self.callbacks:
                callback.on_step(step)
            if last or ends_phase or step % recipe.logging.interval_steps == 0:
                self._report_training()
            if step % recipe.logging.usage_interval_steps == 0:
                self._report_usage()
            ends_part = (recipe.checkpoint.keep_epochs and self._epoch_is_over()) or ends_phase
            self._part_is_due |= ends_part
            if self.validation is not None and (
                last or ends_part or step % recipe.validation.interval_steps == 0
            ):
                best = self._validate(self.validation, last)
                if not last and self.supervisor.ends_early(self.progress):
                    last = True
                    self._end_early(self.validation)
            stopped = self._asked_to_stop() and not last
            due = (
                self._part_is_due
                or step % recipe.checkpoint.interval_steps == 0
                or (best and recipe.checkpoint.keep_best)
            )
            # While steps are skipped one after the other nothing new is to be saved, and older checkpoints may soon be needed.
            if last or stopped or (due and not self.progress.skipped_in_a_row):
                self._save()
        return not stopped

    def _asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop; one all-reduce a step also spreads that a rank has found damaged data."""
        if not self.topology.any_rank(self.stop.requested or self.data_check.fault is not None):
            return False
        self._agree_on_data()
        return True

    def _agree_on_data(self) -> None:
        """Every rank must call it.

        Raises:
            DataError: on all ranks, for what any of them has found in the data so far.
        """
        faults = [
            fault for fault in self.topology.all_gather(self.data_check.fault) if fault is not None
        ]
        if faults:
            others = f" (and {len(faults) - 1} more by other ranks)" if len(faults) > 1 else ""
            raise DataError(f"{faults[0]}{others}; no checkpoint was written since this start")

    def _step(self) -> bool:
        """One optimizer step; False where the run went back instead."""
        started = time.perf_counter()
        step = self.progress.step
        if (stage := self.timeline.at(step)) is not self._stage:
            self._enter(stage)
        factor = run_learning_rate_factor(step, self.timeline, self.recipe.schedule)
        moe = self.recipe.model.routing
        balance_rate = (
            balance_update_rate(step, self.num_steps, moe.bias_balancing)
            if moe is not None and moe.bias_balancing is not None
            else 0.0
        )
        batches = self.loader.step_batches(step)
        self.supervisor.begin_step(step + 1)
        result = self.engine.train_step(batches, factor, balance_rate, self.supervisor.judge)
        self.progress.step += 1
        self.progress.train_seconds += time.perf_counter() - started
        self._pending.append(result)
        violation = self.supervisor.after_step(self.progress, batches, result)
        if violation is not None:
            self._roll_back(violation)
        return violation is None

    def _roll_back(self, violation: Violation) -> None:
        """Goes back to the newest checkpoint before the incident, and from there on to data behind it."""
        before, checkpoint = self.progress, self.store.go_back(violation.from_step, self._trunk)
        if checkpoint is None:
            raise GuardError(
                f"step {violation.step}: {violation.reason}, and there is no checkpoint before it to go back to: lower checkpoint.interval_steps"
            )
        consumed = self.loader.consumed(before.step + self.recipe.guards.rollback.skip_steps)
        self.resume(checkpoint)
        progress = self.progress
        progress.rollbacks, progress.train_seconds = before.rollbacks + 1, before.train_seconds
        progress.skipped_steps, progress.skipped_tokens = (
            before.skipped_steps,
            before.skipped_tokens,
        )
        self.loader.pass_over(progress.step, consumed)
        self.loader.require(self.num_steps)
        self.engine.take_usage()
        self._usage_started, self._row_started = (
            progress.step,
            time.perf_counter() - self._row_seconds,
        )
        for callback in self.callbacks:
            callback.on_rollback(progress.step)

    def _epoch_is_over(self) -> bool:
        """Whether a pass over the training split ended in the step that is done, or was passed over before it."""
        before, self._epoch = self._epoch, int(self.loader.epochs(self.progress.step) or 0)
        self._epoch_is_due |= self._epoch > before
        return self._epoch > before

    def _enter(self, stage: Phase) -> None:
        """Goes into a phase, at its beginning or, after a resume, anywhere in it."""
        self._stage = stage
        self.engine.enter(stage)
        length = stage.recipe.train.sequence_length
        if self.validation is not None and self.validation.sequence_length != length:
            self.validation = self.validation.of_length(length)
        if self.timeline.changes_length(self.progress.step):
            # Losses over windows of different lengths do not compare.
            self.progress.forget_best()
            self.progress.forget_patience()
        if self.progress.step == stage.first_step:
            self.supervisor.restore(
                {}
            )  # losses and norms of other batches, lengths and data are no measure
        if self.peak is not None:
            self._flops_per_token = model_size(stage.recipe.model, length).flops_per_token
        if stage.name:
            logger.info(
                "phase %d, '%s': steps %d to %d",
                stage.number,
                stage.name,
                stage.first_step + 1,
                stage.end_step,
            )

    def _row(self, kind: str) -> Row:
        """What every row begins with: where in the run and in the data it stands."""
        step = self.progress.step
        stage, epochs = self.timeline.at(step - 1), self.loader.epochs(step)
        phase = {"phase": stage.name, "phase_number": stage.number} if stage.name else {}
        return (
            {"kind": kind, "step": step, "tokens": self.timeline.tokens_after(step)}
            | ({} if epochs is None else {"epoch": epochs})
            | phase
        )

    def _end_early(self, validation: Windows) -> None:
        """Makes the step that was just taken the last one, with the row and the validation that a last one has."""
        self.progress.stopped_early = True
        self.num_steps = self.progress.step
        for callback in self.callbacks:
            callback.on_early_end(self.num_steps)
        if self._pending:
            self._report_training()
        if self._samples(validation):
            self._validation_loss(validation, whole=True)

    def _report_training(self) -> None:
        """Reads what has gathered on the device since the last row; what was skipped takes part in no mean."""
        results = self._pending
        applied = [result for result in results if result.applied]
        if not applied:
            return
        self._pending = []
        losses, router = reduce_steps(applied, self.topology)
        self.supervisor.after_losses(self.progress.step, results, [row[0] for row in losses])
        means = [sum(column) / len(column) for column in zip(*losses, strict=True)]
        self._training_loss = means[0]
        now = time.perf_counter()
        seconds, self._row_started = now - self._row_started, now
        row = self._row("train")
        tokens_per_second = (
            row["tokens"] - self.timeline.tokens_after(self.progress.step - len(results))
        ) / seconds
        row |= {
            "steps": len(applied),
            **dict(zip(LOSS_COLUMNS, means)),
            "learning_rate": self.engine.learning_rate(),
            "grad_norm": applied[-1].grad_norm,
            "tokens_per_second": tokens_per_second,
            "skipped_steps": self.progress.skipped_steps,
            "loss_scale": self.engine.loss_scale(),
            "seconds": self.progress.train_seconds,
            "stall_seconds": self.loader.waiting.seconds,
        }
        if self.peak is not None:
            row["mfu"] = (
                tokens_per_second * self._flops_per_token / (self.peak * self.topology.world_size)
            )
        row |= _router_columns(router, self.recipe.model)
        for callback in self.callbacks:
            callback.on_row(row)

    def _report_usage(self) -> None:
        """Ends a window of expert usage: at every multiple of ``logging.usage_interval_steps``.

        The counters are in no checkpoint. A window that a resume cuts starts anew behind the checkpoint, and its row and file say how many
        steps it has; the others are the same as without the interruption.
        """
        started = time.perf_counter()
        counts_LE, step = self.engine.take_usage(), self.progress.step
        steps, self._usage_started = step - self._usage_started, step
        if counts_LE is not None and self.callbacks:
            window = UsageWindow(step, steps, self.recipe.model.routed_layers, counts_LE.numpy())
            row = self._row("usage") | {"steps": steps}
            row |= usage_columns(window, self.recipe.logging.hot_expert_factor)
            for callback in self.callbacks:
                callback.on_usage(window)
                callback.on_row(row)
        self._row_started += time.perf_counter() - started  # not training time

    def _samples(self, windows: Windows) -> bool:
        """Whether a validation in the loop reads a part of the split only."""
        limit = self.recipe.validation.max_windows
        return limit is not None and limit < windows.num_all

    def _validate(self, windows: Windows, last: bool) -> bool:
        """Loss over the validation split, or the fixed sample of it; at the end of a run then over all of it too. True for the best one so far.

        Which is the best is judged on one and the same data. Where steps are being skipped nothing is saved, and so nothing is the best.
        """
        progress, loss = self.progress, self._validation_loss(windows, whole=False)
        if not last:
            self.supervisor.after_validation(progress, loss, self._training_loss)
        best = not progress.skipped_in_a_row and (
            progress.best_validation is None or loss < progress.best_validation
        )
        if best:
            progress.best_validation, progress.best_step = loss, progress.step
        if last and self._samples(windows):
            self._validation_loss(windows, whole=True)
        return best

    def _validation_loss(self, windows: Windows, whole: bool) -> float:
        started = time.perf_counter()
        limit = None if whole else self.recipe.validation.max_windows
        size, loader = self.engine.now.train.micro_batch_size, self.loader
        nll, targets = self.engine.evaluate(
            validation_batches(windows, size, loader.dp_rank, loader.dp_size, limit)
        )
        progress, loss = self.progress, nll / targets
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the validation loss of step {progress.step} is not finite: lower optimizer.learning_rate; the last checkpoint is intact"
            )
        progress.last_validation, progress.validation_step, progress.validation_targets = (
            loss,
            progress.step,
            targets,
        )
        row = self._row("validation") | {"validation_loss": loss, "targets": targets}
        for callback in self.callbacks:
            callback.on_row(row)
        self._row_started += time.perf_counter() - started  # not training time
        return loss

    def _weights_are_finite(self) -> bool:
        """The same answer on every rank; of a weight that ZeRO 3 has partitioned, each rank looks at its own part."""
        parts = (
            getattr(parameter, "ds_tensor", parameter)
            for parameter in self.engine.model.parameters()
        )
        rows = self.engine.rows
        return not self.topology.any_rank(
            not all(bool(part.isfinite().all()) for part in parts)
            or (rows is not None and not rows.is_finite())
        )

    def _save(self) -> None:
        started = time.perf_counter()
        progress = self.progress
        if (
            not self._data_is_checked
        ):  # a checkpoint must not have learned from damaged data in silence
            self.data_check.finish(give_up=self.stop.requested)
            self._agree_on_data()
            self._data_is_checked = True
        if not self._weights_are_finite():
            raise NonFiniteError(
                f"the weights after step {progress.step} are not finite: lower optimizer.learning_rate; the last checkpoint is intact"
            )
        if self._epoch_is_due:
            progress.epoch_steps[str(self._epoch)] = progress.step
        self._part_is_due = self._epoch_is_due = False
        state = (
            self.identity
            | self.facts
            | {
                "step": progress.step,
                "consumed_tokens": self.timeline.tokens_after(progress.step),
                "epoch": self.loader.epochs(progress.step),
                "validation_loss": progress.last_validation,
                "validation_step": progress.validation_step,
                "validation_targets": progress.validation_targets,
                "phase": self.timeline.at(progress.step - 1).name or None,
                "progress": asdict(progress),
                "data": self.loader.state(progress.step),
                "guards": self.supervisor.state(),
            }
        )
        named = (
            {f"{EPOCH}{epoch}": step for epoch, step in progress.epoch_steps.items()}
            if self.recipe.checkpoint.keep_epochs
            else {}
        )
        if self.recipe.checkpoint.keep_best and progress.best_step is not None:
            named[BEST] = progress.best_step
        own = {"pending": to_state(self._pending), "row_seconds": started - self._row_started}
        self.store.save(progress.step, state, named, own)
        self._row_started += time.perf_counter() - started


def _router_columns(router: RouterTotals | None, model: ModelConfig) -> Row:
    """Means over the layers with a router, and one entry a layer with the share of choices that each expert got (1/E when balanced)."""
    if router is None or model.routing is None:
        return {}
    shares_LE = router.counts_LE / router.counts_LE.sum(dim=1, keepdim=True)
    shown = [
        name
        for name, weight in loss_weights(model.routing).items()
        if weight or name in ALWAYS_COMPUTED
    ]
    losses = {
        name: values_L
        for name, values_L in zip(LOSSES, router.losses_LJ.unbind(1), strict=True)
        if name in shown
    }
    per_layer = {
        "expert_load": shares_LE,
        **losses,
        "entropy": router.entropy_L,
        "dropped_share": router.dropped_L,
    }
    values = zip(*(column.tolist() for column in per_layer.values()), strict=True)
    return {
        **{name: values_L.mean().item() for name, values_L in losses.items()},
        "router_entropy": router.entropy_L.mean().item(),
        # MaxVio (Wang et al. 2024): how far the busiest expert is above the mean load.
        "max_violation": (shares_LE.max(dim=1).values * shares_LE.shape[1] - 1).mean().item(),
        "dropped_share": router.dropped_L.mean().item(),
        "layers": [
            {"layer": layer} | dict(zip(per_layer, row, strict=True))
            for layer, row in zip(model.routed_layers, values, strict=True)
        ],
    }
