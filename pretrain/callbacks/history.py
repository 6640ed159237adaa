"""training_history.json: one entry for each validation, in columns, and the best of them; what
notebooks and plots of a run start from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain.callbacks.base import Callback, Row
from pretrain.callbacks.metrics import METRICS, read_rows
from pretrain.config.timeline import Timeline
from pretrain.core.files import write_synced

HISTORY = "training_history.json"
# From the last row of training before a validation, by the name that it has there.
LAST_OF = {
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "tokens_per_second": "tokens_per_second",
    "seconds": "seconds",
}
COLUMNS = (
    "step",
    "tokens",
    "epoch",
    "train_loss",
    "val_loss",
    "val_targets",
    "perplexity",
    *LAST_OF,
)


class History:
    """Gathers rows into entries.

    A run without a validation split gets an entry for each row of training.

    Attributes:
        best: the entry with the lowest validation loss among those that compare: over as many
            targets, in sequences of the same length. Of the two validations of a last step the one
            of the whole split is the step's entry, and the other one takes part.
    """

    def __init__(self, validates: bool, timeline: Timeline) -> None:
        self.validates, self.timeline = validates, timeline
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self.best: dict[str, Any] | None = None
        self._sums = self._entered = (
            0.0,
            0,
        )  # losses over steps, and steps: since the last entry, and of that entry
        self._last_step = 0
        self._last: Row = {}

    def add(self, row: Row) -> bool:
        """Whether the row made a new entry, or replaced that of the same step."""
        if row["kind"] == "train":
            # Entries are means over steps, whatever their rows are. A row without its number of
            # steps is the mean since the one before.
            steps = row.get("steps", row["step"] - self._last_step)
            self._sums = (self._sums[0] + steps * row["loss"], self._sums[1] + steps)
            self._last_step, self._last = row["step"], row
        if row["kind"] != ("validation" if self.validates else "train"):
            return False
        again = self.columns["step"][-1:] == [row["step"]]
        if again:
            self._sums = (self._sums[0] + self._entered[0], self._sums[1] + self._entered[1])
            for values in self.columns.values():
                values.pop()
        loss = row.get("validation_loss")
        entry = {
            "step": row["step"],
            "tokens": row["tokens"],
            "epoch": row.get("epoch"),
            "train_loss": self._sums[0] / self._sums[1] if self._sums[1] else None,
            "val_loss": loss,
            "val_targets": row.get("targets"),
            "perplexity": None if loss is None else _exp(loss),
            **{name: self._last.get(source) for name, source in LAST_OF.items()},
        }
        for name, value in entry.items():
            self.columns[name].append(value)
        self._sums, self._entered = (0.0, 0), self._sums
        if (
            loss is not None
            and not again
            and (
                self.best is None
                or not self._compare(self.best, entry)
                or loss < self.best["val_loss"]
            )
        ):
            self.best = entry
        return True

    def _compare(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        """Whether the validation losses of two entries are of the same data."""
        lengths = [
            self.timeline.at(entry["step"] - 1).recipe.train.sequence_length
            for entry in (one, other)
        ]
        return lengths[0] == lengths[1] and one["val_targets"] == other["val_targets"]

    def content(self) -> dict[str, Any]:
        """Columns of one length, ``best`` (None without validation) and ``units``."""
        units = {
            "train_loss": "nats a token, mean since the last entry",
            "val_loss": "nats a token",
            "seconds": "of training, without validation",
        }
        return {**self.columns, "best": self.best, "units": units}


def _exp(loss: float) -> float | None:
    """JSON has no infinity."""
    value = math.exp(min(loss, 700.0))
    return value if loss < 700.0 else None


def history_of(rows: Iterable[Row], validates: bool, timeline: Timeline) -> History:
    history = History(validates, timeline)
    for row in rows:
        history.add(row)
    return history


class TrainingHistory(Callback):
    """Writes the file at each entry, whole; on a resume or rollback it is made again from the rows
    up to the checkpoint.
    """

    def __init__(self, folder: Path, validates: bool, timeline: Timeline) -> None:
        self.folder, self.validates, self.timeline = folder, validates, timeline
        self.history = History(validates, timeline)

    def on_start(self, step: int, num_steps: int) -> None:
        self.on_rollback(step)

    def on_rollback(self, step: int) -> None:
        rows = [row for row in read_rows(self.folder / METRICS) if row["step"] <= step]
        self.history = history_of(rows, self.validates, self.timeline)
        if (self.folder / HISTORY).is_file():
            self._write()

    def on_row(self, row: Row) -> None:
        if self.history.add(row):
            self._write()

    def _write(self) -> None:
        write_synced(
            self.folder / HISTORY, (json.dumps(self.history.content(), indent=1) + "\n").encode()
        )
