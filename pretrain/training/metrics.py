"""Training metrics: step results stay on the device, and are read once for each record.

Reading a value from a GPU waits for all work that was queued before it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.loading.interface import Loader
from pretrain.analysis.expert_usage import UsageWindow, usage_columns
from pretrain.config.recipe import LoggingConfig
from pretrain.config.timeline import Phase
from pretrain.engine.engine import Engine
from pretrain.engine.step import MeanLosses, StepResult, reduce_steps
from pretrain.guards.policy import GuardPolicy
from pretrain.guards.progress import Progress
from pretrain.model.config import ModelConfig
from pretrain.model.sizes import model_size
from pretrain.training.goodput import GoodputMeter
from pretrain.training.hardware import HardwareMeter
from pretrain.training.records import (
    RecordWriter,
    RouterRecord,
    TimingRecord,
    TrainRecord,
    UsageRecord,
)
from pretrain.training.slow_ranks import OwnTime, report, slow_ranks
from pretrain.training.timing import StepTimer

logger = logging.getLogger(__name__)

# Training records between two records of times, which gather something from all ranks.
RECORDS_PER_TIMING = 10


def timing_interval(config: LoggingConfig) -> int:
    """Return the steps between two records of times."""
    return RECORDS_PER_TIMING * config.interval_steps


@dataclass
class MetricsRecorder:
    """Makes the records of training steps and of expert usage. Every rank must call it alike.

    Attributes:
        guards: those that only warn look at losses here, when these come to the host.
        peak_flops: FLOP/s of the device; None if it is not known.
        goodput, own_time: what a record of times holds.
        hardware: what the model card says of hours and energy.
        pending: steps that are in no record yet.
        training_loss: of the last record; None before there is one.
    """

    engine: Engine
    loader: Loader
    guards: GuardPolicy
    writer: RecordWriter
    timer: StepTimer
    model: ModelConfig
    config: LoggingConfig
    peak_flops: float | None
    goodput: GoodputMeter
    own_time: OwnTime
    hardware: HardwareMeter
    training_loss: float | None = None

    def __post_init__(self) -> None:
        self.pending: list[StepResult] = []
        self._flops_per_token = 0.0
        # The step after which the window of expert usage began.
        self._usage_started = 0

    def start(self, progress: Progress) -> None:
        """Begin after the steps that are done."""
        self._usage_started = progress.step
        self.goodput.begin(progress)
        self.hardware.begin()

    def restart(self, step: int) -> None:
        """Begin again after a rollback to step ``step``, without what was counted since."""
        # Taking the counts resets them.
        self.engine.usage.take()
        self._usage_started = step

    def enter(self, phase: Phase) -> None:
        """Begin a phase."""
        if self.peak_flops is not None:
            length = phase.recipe.train.sequence_length
            self._flops_per_token = model_size(phase.recipe.model, length).flops_per_token

    def add(self, result: StepResult) -> None:
        """Keep a step for the next record."""
        self.pending.append(result)

    def record(self, progress: Progress, is_due: bool) -> None:
        """Make the records that are due after a step.

        Args:
            is_due: whether a training record is due, also between multiples of the interval.
        """
        self.goodput.note(progress)
        self.hardware.note()
        if is_due or progress.step % self.config.interval_steps == 0:
            self.record_training(progress)
        if is_due or progress.step % timing_interval(self.config) == 0:
            self._record_timing(progress.step)
        if progress.step % self.config.usage_interval_steps == 0:
            self._record_usage(progress.step)

    def record_training(self, progress: Progress) -> None:
        """Make a record of the pending steps.

        Skipped ones are in no mean, and make no record alone.
        """
        results = self.pending
        applied = [result for result in results if result.applied]
        # The skipped ones stay pending: their tokens and seconds count in the next record.
        if not applied:
            return
        self.pending = []
        topology = self.engine.topology
        # One all-reduce and one transfer for all pending steps.
        losses, router = reduce_steps(applied, topology)
        self.guards.after_losses(progress.step, results, losses)
        means = _mean(losses)
        self.training_loss = means.cross_entropy
        position = self.writer.position(progress.step)
        # The speed is of all pending steps, because skipped ones take their time too.
        before = self.writer.timeline.tokens_after(progress.step - len(results))
        tokens_per_second = (position.tokens - before) / self.timer.next_window()
        mfu: float | None = None
        if self.peak_flops is not None:
            peak = self.peak_flops * topology.world_size
            mfu = tokens_per_second * self._flops_per_token / peak
        record = TrainRecord(
            position=position,
            steps=len(applied),
            losses=means,
            learning_rate=self.engine.learning_rate(),
            learning_rate_factor=progress.learning_rate_factor,
            grad_norm=applied[-1].grad_norm,
            tokens_per_second=tokens_per_second,
            skipped_steps=progress.skipped_steps,
            loss_scale=self.engine.loss_scale.value(),
            seconds=progress.train_seconds,
            stall_seconds=progress.stall_seconds,
            mfu=mfu,
            router=RouterRecord.of(router, self.model),
        )
        self.writer.write(record)

    def _record_timing(self, step: int) -> None:
        # Collective: before rank 0 alone continues.
        times = self.own_time.gather()
        self.hardware.share()
        goodput = self.goodput.measure()
        if goodput is None:
            return
        logger.info("step %d: goodput %s", step, json.dumps(goodput))
        if times is None:
            self.writer.write(TimingRecord(self.writer.position(step), goodput, [], {}))
            return
        report(times)
        seconds = [rank.seconds for rank in times]
        record = TimingRecord(self.writer.position(step), goodput, seconds, slow_ranks(times))
        self.writer.write(record)

    def _record_usage(self, step: int) -> None:
        """End a window of expert usage.

        The counters are in no checkpoint. A window that a resume cuts starts anew after the
        checkpoint, and its record and file say how many steps it has; the others are the same as
        without the interruption.
        """
        with self.timer.paused("files"):
            # Collective: before rank 0 alone continues.
            counts_LE = self.engine.usage.take()
            steps = step - self._usage_started
            self._usage_started = step
            if counts_LE is None or not self.writer.callbacks:
                return
            window = UsageWindow(step, steps, self.model.routed_layers, counts_LE.numpy())
            columns = usage_columns(window, self.config.hot_expert_factor)
            self.writer.callbacks.on_usage(window)
            self.writer.write(UsageRecord(self.writer.position(step), steps, columns))


def _mean(losses: Sequence[MeanLosses]) -> MeanLosses:
    further = [step.multi_token for step in losses if step.multi_token is not None]
    return MeanLosses(
        cross_entropy=sum(step.cross_entropy for step in losses) / len(losses),
        total=sum(step.total for step in losses) / len(losses),
        multi_token=sum(further) / len(further) if further else None,
    )
