"""What a callback is given, and when it is called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.analysis.expert_usage import UsageWindow
from pretrain.config.recipe import Recipe

Row = dict[str, Any]


@dataclass(frozen=True)
class CallbackRun:
    """What the callback of a recipe's ``callbacks`` is made from, beside its own section.

    Attributes:
        folder: of the run; what the callback writes belongs into it.
        recipe: resolved.
        world_size: ranks of the run.
    """

    folder: Path
    recipe: Recipe
    world_size: int


class Callback:
    """Only rank 0 has callbacks; none may communicate with other ranks."""

    def on_start(self, step: int, num_steps: int) -> None:
        """Training starts after ``step`` finished steps (0, or those of the checkpoint)."""

    def on_step(self, step: int) -> None:
        """Step ``step`` (from 1) is done."""

    def on_row(self, row: Row) -> None:
        """A row of metrics, after its step's ``on_step``: ``kind`` is "train", "validation" or
        "usage" (of experts, after its ``on_usage``).
        """

    def on_usage(self, window: UsageWindow) -> None:
        """A window of expert usage is over, with the counts of all experts."""

    def on_rollback(self, step: int) -> None:
        """Training goes back to the checkpoint of step ``step``: the steps behind it are taken
        again.
        """

    def on_early_end(self, step: int) -> None:
        """Step ``step``, which is done, is the last one, though more were planned."""

    def on_end(self, summary: Row) -> None:
        """Training ends: all steps done, or interrupted and saved.

        ``summary`` is what summary.json says of the run.

        A finished run that is killed in here is told of its start and its end once more when it is
        started again.
        """

    def on_failure(self, error: Exception) -> None:
        """Training ends by an error, and nothing else is called."""
