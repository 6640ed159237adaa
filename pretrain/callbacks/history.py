"""training_history.json: what notebooks and plots of a run start from.

It has one entry for each validation, in columns, and the best of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pretrain.callbacks.base import Callback, MetricsRecord
from pretrain.callbacks.metrics import METRICS, read_records
from pretrain.checkpoint.model_card import perplexity_of
from pretrain.config.timeline import Timeline
from pretrain.core.files import JsonObject, write_synced

HISTORY = "training_history.json"
UNITS = {
    "train_loss": "nats a token, mean since the last entry",
    "val_loss": "nats a token",
    "seconds": "of training, without validation",
}


@dataclass(frozen=True)
class HistoryEntry:
    """One entry; its fields are the columns of the file.

    ``learning_rate`` and what follows are those of the last training record before the entry.
    """

    step: int
    tokens: int
    epoch: float | None
    train_loss: float | None
    val_loss: float | None
    val_targets: int | None
    perplexity: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_second: float | None
    seconds: float | None


COLUMNS = tuple(field.name for field in fields(HistoryEntry))


@dataclass(frozen=True)
class LossSum:
    """Training losses that are gathered for an entry."""

    losses: float = 0.0
    steps: int = 0

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(self.losses + other.losses, self.steps + other.steps)

    @property
    def mean(self) -> float | None:
        """Nats a token; None without a step."""
        return self.losses / self.steps if self.steps else None


class History:
    """Gathers records into entries.

    A run without a validation split gets an entry for each training record.

    Attributes:
        entries: from the oldest to the newest.
        best: the entry with the lowest validation loss among those that compare: over equally many
            targets, in sequences of the same length. The last step of a run may be validated twice,
            on a sample and on the whole split: the second one is the step's entry, and the first
            one takes part in the comparison.
    """

    def __init__(self, validates: bool, timeline: Timeline) -> None:
        self.validates = validates
        self.timeline = timeline
        self.entries: list[HistoryEntry] = []
        self.best: HistoryEntry | None = None
        self._gathered = LossSum()  # since the last entry
        self._entered = LossSum()  # of the last entry
        self._last_train: MetricsRecord = {"step": 0}

    def add(self, record: MetricsRecord) -> bool:
        """Return whether the record made a new entry, or replaced that of the same step."""
        if record["kind"] == "train":
            # Entries are means over steps, however many of them a record has. An earlier version
            # did not write the number: then it is the mean since the record before.
            steps = record.get("steps", record["step"] - self._last_train["step"])
            self._gathered += LossSum(steps * record["loss"], steps)
            self._last_train = record
        if record["kind"] != ("validation" if self.validates else "train"):
            return False
        again = bool(self.entries) and self.entries[-1].step == record["step"]
        # The last step is validated on a sample, then on the whole split: one entry for both.
        if again:
            self.entries.pop()
            self._gathered += self._entered
        entry = self._entry(record)
        self.entries.append(entry)
        self._entered = self._gathered
        self._gathered = LossSum()
        if not again and self._is_best(entry):
            self.best = entry
        return True

    def _entry(self, record: MetricsRecord) -> HistoryEntry:
        loss = record.get("validation_loss")
        last = self._last_train
        return HistoryEntry(
            step=record["step"],
            tokens=record["tokens"],
            epoch=record.get("epoch"),
            train_loss=self._gathered.mean,
            val_loss=loss,
            val_targets=record.get("targets"),
            perplexity=None if loss is None else perplexity_of(loss),
            learning_rate=last.get("learning_rate"),
            grad_norm=last.get("grad_norm"),
            tokens_per_second=last.get("tokens_per_second"),
            seconds=last.get("seconds"),
        )

    def _is_best(self, entry: HistoryEntry) -> bool:
        if entry.val_loss is None:
            return False
        best = self.best
        if best is None or best.val_loss is None or not self._compares(best, entry):
            return True
        return entry.val_loss < best.val_loss

    def _compares(self, one: HistoryEntry, other: HistoryEntry) -> bool:
        """Whether the validation losses of two entries are of the same data."""
        # Longer windows have more context for each token, and so a lower loss.
        lengths = {
            self.timeline.at(entry.step - 1).recipe.train.sequence_length for entry in (one, other)
        }
        return len(lengths) == 1 and one.val_targets == other.val_targets

    def content(self) -> JsonObject:
        """Return columns of one length, ``best`` (None without validation) and ``units``."""
        columns = {name: [getattr(entry, name) for entry in self.entries] for name in COLUMNS}
        best = None if self.best is None else asdict(self.best)
        return {**columns, "best": best, "units": UNITS}


def history_of(records: Iterable[MetricsRecord], validates: bool, timeline: Timeline) -> History:
    """Gather all records of a run."""
    history = History(validates, timeline)
    for record in records:
        history.add(record)
    return history


class TrainingHistory(Callback):
    """Writes the whole file at each entry.

    On a resume or rollback it is made again from the records up to the checkpoint.
    """

    def __init__(self, folder: Path, validates: bool, timeline: Timeline) -> None:
        self.folder = folder
        self.validates = validates
        self.timeline = timeline
        self.history = History(validates, timeline)

    def on_start(self, step: int, num_steps: int) -> None:
        """Gather the records up to step ``step``."""
        self.on_rollback(step)

    def on_rollback(self, step: int) -> None:
        """Gather the records up to step ``step``, and forget the later ones."""
        records = read_records(self.folder / METRICS)
        kept = [record for record in records if record["step"] <= step]
        self.history = history_of(kept, self.validates, self.timeline)
        if (self.folder / HISTORY).is_file():
            self._write()

    def on_record(self, record: MetricsRecord) -> None:
        """Write the file if the record makes an entry."""
        if self.history.add(record):
            self._write()

    def _write(self) -> None:
        text = json.dumps(self.history.content(), indent=1) + "\n"
        write_synced(self.folder / HISTORY, text.encode())
