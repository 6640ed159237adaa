"""metrics.jsonl (everything), metrics.csv (the scalars of training and validation) and loss.png.

They are kept in step with the checkpoint that a run resumes from.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

from pretrain.callbacks.base import Callback, Row

CSV_COLUMNS = (
    "kind", "step", "tokens", "loss", "total_loss", "multi_token_loss", "validation_loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu",
    "aux_loss", "z_loss", "router_entropy", "max_violation", "dropped_share", "skipped_steps", "loss_scale", "seconds", "stall_seconds",
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
    """Writes each row at once; on a resume or rollback, rows beyond the checkpoint are removed, because those steps run again."""

    def __init__(self, folder: Path) -> None:
        self.jsonl, self.csv = folder / "metrics.jsonl", folder / "metrics.csv"

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


class LossPlot(Callback):
    """loss.png from metrics.jsonl, drawn when training ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_end(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows = read_rows(self.folder / "metrics.jsonl")
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        for kind, column, style in (("train", "loss", "-"), ("validation", "validation_loss", "o-")):
            points = [(row["tokens"], row[column]) for row in rows if row["kind"] == kind]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=kind, linewidth=1.2, markersize=4)
        axes.set(xlabel="tokens", ylabel="cross-entropy, nats a token", title=self.folder.name)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.folder / "loss.png", dpi=120)
        pyplot.close(figure)
