"""README.md of the run: its model card, with what was measured up to its end."""

from __future__ import annotations

from pathlib import Path

from pretrain.callbacks.base import Callback, Row
from pretrain.checkpoint.layout import CARD, pointers, read_state
from pretrain.checkpoint.model_card import model_card, table
from pretrain.config.recipe import Recipe
from pretrain.core.files import write_synced
from pretrain.evaluation.watch import read_evaluations


def newest_evaluation(run: Path, step: int) -> dict[str, float]:
    """The numbers of the last checkpoint up to ``step`` that was evaluated beside the training,
    without how much was read for them.
    """
    counts = ("step", "targets", "window", "windows", "stride")
    rows = [row for row in read_evaluations(run) if row["step"] <= step]
    newest = max(rows, key=lambda row: row["step"], default={})
    numbers = {
        name: value
        for name, value in newest.items()
        if isinstance(value, float) and name.rpartition("/")[2] not in counts
    }
    return {f"{name}, at step {newest['step']:,}": value for name, value in numbers.items()}


class ModelCard(Callback):
    """Written when the run ends or is interrupted, from its newest checkpoint."""

    def __init__(self, folder: Path, checkpoints: Path, recipe: Recipe) -> None:
        self.folder, self.checkpoints, self.recipe = folder, checkpoints, recipe

    def on_end(self, summary: Row) -> None:
        named = pointers(self.checkpoints)
        state = read_state(self.checkpoints / named["latest"])
        lines = table(
            ["checkpoint", "folder"],
            [[name, f"checkpoints/{step}"] for name, step in named.items()],
        )
        text = model_card(
            self.recipe, state, newest_evaluation(self.folder, state["step"])
        ) + "\n".join(["", "## Checkpoints", "", *lines, ""])
        write_synced(self.folder / CARD, text.encode())
