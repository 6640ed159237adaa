"""One line on the terminal: loss, speed, time left."""

from __future__ import annotations

import sys

from tqdm import tqdm

from pretrain.callbacks.base import Callback, Row


class ProgressBar(Callback):
    """A bar on standard error; where that is no terminal, a line every half minute."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}

    def on_start(self, step: int, num_steps: int) -> None:
        interval = 0.5 if sys.stderr.isatty() else 30.0
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
        assert self.bar is not None
        self.bar.update(1)

    def on_row(self, row: Row) -> None:
        assert self.bar is not None
        if "phase" in row:
            self.shown["phase"] = row["phase"]
        if row["kind"] == "train":
            self.shown |= {
                "loss": f"{row['loss']:.3f}",
                "tok/s": f"{row['tokens_per_second']:,.0f}",
            }
        elif row["kind"] == "validation":
            self.shown["val"] = f"{row['validation_loss']:.3f}"
        self.bar.set_postfix(self.shown, refresh=False)

    def on_rollback(self, step: int) -> None:
        assert self.bar is not None
        self.bar.n = step
        self.bar.refresh()

    def on_early_end(self, step: int) -> None:
        assert self.bar is not None
        self.bar.total = step

    def on_end(self, summary: Row) -> None:
        if self.bar is not None:
            self.bar.close()
