"""TensorBoard, and what else of DeepSpeed's monitor the ds_config enables: CSV, W&B, Comet."""

from __future__ import annotations

from pretrain.callbacks.base import Callback, Row
from pretrain.callbacks.events import events_of
from pretrain.engine.monitor import Monitor


class DeepSpeedMonitor(Callback):
    """Writes every record of metrics through DeepSpeed's monitor."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def on_start(self, step: int, num_steps: int) -> None:
        self.monitor.begin_after(step)

    def on_rollback(self, step: int) -> None:
        self.monitor.begin_after(step)

    def on_row(self, row: Row) -> None:
        self.monitor.write_record(events_of(row), row["step"])
