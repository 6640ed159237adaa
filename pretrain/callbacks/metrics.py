"""metrics.jsonl (every record) and training_log.csv (the scalars of training and validation).

They are kept in step with the checkpoint that a run resumes from.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

from pretrain.callbacks.base import Callback, MetricsRecord
from pretrain.core.files import named_in_errors, write_synced

METRICS = "metrics.jsonl"
TRAINING_LOG = "training_log.csv"
CSV_COLUMNS = (
    "kind",
    "step",
    "tokens",
    "epoch",
    "phase",
    "loss",
    "total_loss",
    "multi_token_loss",
    "validation_loss",
    "perplexity",
    "validation_perplexity",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "aux_loss",
    "z_loss",
    "router_entropy",
    "max_violation",
    "dropped_share",
    "skipped_steps",
    "loss_scale",
    "seconds",
    "stall_seconds",
)
CSV_KINDS = ("train", "validation")


def read_records(path: Path) -> list[MetricsRecord]:
    """Return the records of a metrics.jsonl; a last line torn by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricsFiles(Callback):
    """Writes each record at once.

    On a resume or rollback, records beyond the checkpoint are removed: those steps run again.
    """

    def __init__(self, folder: Path) -> None:
        self.jsonl = folder / METRICS
        self.csv = folder / TRAINING_LOG

    def on_start(self, step: int, num_steps: int) -> None:
        """Remove what is beyond step ``step``."""
        self.on_rollback(step)

    def on_rollback(self, step: int) -> None:
        """Remove what is beyond step ``step``."""
        kept = [record for record in read_records(self.jsonl) if record["step"] <= step]
        # A kill while the file is written anew must not cost the records that it keeps.
        write_synced(self.jsonl, "".join(json.dumps(record) + "\n" for record in kept).encode())
        with named_in_errors(self.csv), self.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(record for record in kept if record["kind"] in CSV_KINDS)

    def on_record(self, record: MetricsRecord) -> None:
        """Append a record."""
        # Opened and closed for each record, so that a killed run loses none.
        with named_in_errors(self.jsonl), self.jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if record["kind"] not in CSV_KINDS:
            return
        with named_in_errors(self.csv), self.csv.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore").writerow(record)
