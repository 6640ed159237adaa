"""One line on the terminal: loss, speed, time left."""

from __future__ import annotations

import sys

from tqdm import tqdm

from pretrain.callbacks.base import Callback, MetricsRecord, Summary

# Seconds between two updates: of a bar, and of the lines of a log file.
TERMINAL_SECONDS = 0.5
FILE_SECONDS = 30.0


class ProgressBar(Callback):
    """A bar on standard error; if that is not a terminal, a line every half minute."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}

    def on_start(self, step: int, num_steps: int) -> None:
        """Show a bar of ``num_steps`` that is at ``step``."""
        interval = TERMINAL_SECONDS if sys.stderr.isatty() else FILE_SECONDS
        self.bar = tqdm(
            total=num_steps,
            initial=step,
            unit="step",
            desc="training",
            mininterval=interval,
            maxinterval=interval,
            dynamic_ncols=True,
        )

    def on_step(self, step: int) -> None:
        """Move by one step."""
        assert self.bar is not None
        self.bar.update(1)

    def on_record(self, record: MetricsRecord) -> None:
        """Show the newest losses and speed with the next update."""
        assert self.bar is not None
        if "phase" in record:
            self.shown["phase"] = record["phase"]
        if record["kind"] == "train":
            self.shown["loss"] = f"{record['loss']:.3f}"
            self.shown["tok/s"] = f"{record['tokens_per_second']:,.0f}"
        elif record["kind"] == "validation":
            self.shown["val"] = f"{record['validation_loss']:.3f}"
        # refresh=False: a refresh ignores mininterval, and would flood a log file.
        self.bar.set_postfix(self.shown, refresh=False)

    def on_rollback(self, step: int) -> None:
        """Move back to ``step``."""
        assert self.bar is not None
        # tqdm has no way back, except to set its count.
        self.bar.n = step
        self.bar.refresh()

    def on_early_end(self, step: int) -> None:
        """Make ``step`` the bar's end."""
        assert self.bar is not None
        self.bar.total = step

    def on_end(self, summary: Summary) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
