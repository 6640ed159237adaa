"""README.md of the run: its model card, with what was measured up to its end."""

from __future__ import annotations

from pathlib import Path

from pretrain.callbacks.base import Callback, Summary
from pretrain.checkpoint.layout import CARD, LATEST, pointers, read_state
from pretrain.checkpoint.model_card import model_card, table
from pretrain.config.recipe import Recipe
from pretrain.core.files import write_synced
from pretrain.evaluation.watch import read_evaluations

# Columns of an evaluation that say how much was read, and measure nothing.
COUNTS = ("step", "targets", "window", "windows", "stride")


def newest_evaluation(run: Path, step: int) -> dict[str, float]:
    """Return what was measured of the last evaluated checkpoint up to ``step``, by name."""
    evaluations = [record for record in read_evaluations(run) if record["step"] <= step]
    # An evaluation of a later step is of a checkpoint that a rollback has removed.
    newest = max(evaluations, key=lambda record: record["step"], default={})
    measured = {
        name: value
        for name, value in newest.items()
        if isinstance(value, float) and name.rpartition("/")[2] not in COUNTS
    }
    return {f"{name}, at step {newest['step']:,}": value for name, value in measured.items()}


class ModelCard(Callback):
    """Writes the card when the run ends or is interrupted, from its newest checkpoint."""

    def __init__(self, folder: Path, checkpoints: Path, recipe: Recipe) -> None:
        self.folder = folder
        self.checkpoints = checkpoints
        self.recipe = recipe

    def on_end(self, summary: Summary) -> None:
        """Write README.md."""
        steps = pointers(self.checkpoints)
        # Of the newest checkpoint, which is the one that a user would share.
        state = read_state(self.checkpoints / steps[LATEST])
        card = model_card(self.recipe, state, newest_evaluation(self.folder, state["step"]))
        lines = table(
            ["checkpoint", "folder"],
            [[name, f"checkpoints/{step}"] for name, step in steps.items()],
        )
        text = card + "\n".join(["", "## Checkpoints", "", *lines, ""])
        write_synced(self.folder / CARD, text.encode())
