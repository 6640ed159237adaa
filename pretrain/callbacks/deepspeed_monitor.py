"""TensorBoard, and whatever else of DeepSpeed's monitor the ds_config enables: CSV, W&B, Comet."""

from __future__ import annotations

from pretrain.callbacks.base import Callback, MetricsRecord
from pretrain.callbacks.events import events_of
from pretrain.engine.monitor import Monitor


class DeepSpeedMonitor(Callback):
    """Writes every record of metrics through DeepSpeed's monitor."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def on_start(self, step: int, num_steps: int) -> None:
        """Write what follows step ``step``."""
        self.monitor.begin_after(step)

    def on_rollback(self, step: int) -> None:
        """Write what follows step ``step`` anew."""
        self.monitor.begin_after(step)

    def on_record(self, record: MetricsRecord) -> None:
        """Write a record's values."""
        # The monitor translates the step: some of its services count samples.
        self.monitor.write_record(events_of(record), record["step"])
