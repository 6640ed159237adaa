"""metrics.jsonl (everything) and training_log.csv (the scalars of training and validation).

They are kept in step with the checkpoint that a run resumes from.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

from pretrain.callbacks.base import Callback, Row

METRICS, TRAINING_LOG = "metrics.jsonl", "training_log.csv"
CSV_COLUMNS = (
    "kind", "step", "tokens", "epoch", "phase", "loss", "total_loss", "multi_token_loss", "validation_loss", "learning_rate", "grad_norm",
    "tokens_per_second", "mfu", "aux_loss", "z_loss", "router_entropy", "max_violation", "dropped_share", "skipped_steps", "loss_scale", "seconds",
    "stall_seconds",
)  # fmt: skip
CSV_KINDS = ("train", "validation")


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line torn by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsFiles(Callback):
    """Writes each row at once; on a resume or rollback, rows beyond the checkpoint are removed,
    because those steps run again.
    """

    def __init__(self, folder: Path) -> None:
        self.jsonl, self.csv = folder / METRICS, folder / TRAINING_LOG

    def on_start(self, step: int, num_steps: int) -> None:
        self.on_rollback(step)

    def on_rollback(self, step: int) -> None:
        rows = [row for row in read_rows(self.jsonl) if row["step"] <= step]
        temporary = self.jsonl.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, self.jsonl)
        with self.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if row["kind"] in CSV_KINDS)

    def on_row(self, row: Row) -> None:
        with self.jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if row["kind"] not in CSV_KINDS:
            return
        with self.csv.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore").writerow(row)
