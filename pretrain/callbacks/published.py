"""A published loss curve next to that of a run: in training_curves.png and in TensorBoard."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.callbacks.base import Callback
from pretrain.config.published import PublishedPoint, read_published
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Timeline
from pretrain.engine.monitor import TRAIN_LOSS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

LOSSES = {"train": "train_loss", "validation": "validation_loss"}
BY_STEP = "published: other data and splits, at equal steps"
BY_TOKENS = "published: other data and splits, at equal tokens"


@dataclass(frozen=True)
class Overlay:
    """A published curve, placed on a run's axis of tokens.

    Attributes:
        source: the name in legends.
        note: what has to be known to compare.
        steps: its points, by step of the published training.
        tokens: the place of each on the run's axis.
    """

    source: str
    note: str
    steps: list[PublishedPoint]
    tokens: list[int]

    def points(self, name: str) -> list[tuple[int, float]]:
        """Return (tokens, loss) of "train" or "validation"; empty if it has none."""
        losses = [getattr(point, LOSSES[name]) for point in self.steps]
        return [
            (tokens, loss)
            for tokens, loss in zip(self.tokens, losses, strict=True)
            if loss is not None
        ]


def overlay_of(recipe: Recipe, timeline: Timeline) -> Overlay | None:
    """Return the published curve of a recipe; None if it names none.

    Raises:
        ConfigError: if its file is missing or damaged.
    """
    config = recipe.published
    if config is None:
        return None
    points = read_published(config)
    per_step = config.tokens_per_step
    tokens = [
        timeline.tokens_after(point.step) if per_step is None else point.step * per_step
        for point in points
    ]
    note = BY_STEP if per_step is None else BY_TOKENS
    return Overlay(config.source, note, points, tokens)


class PublishedEvents(Callback):
    """Writes a published curve as runs of TensorBoard of their own, into the chart of the loss.

    Args:
        writer: of the run; None without TensorBoard.
    """

    def __init__(self, overlay: Overlay, writer: SummaryWriter | None) -> None:
        self.overlay = overlay
        self.writer = writer

    def on_start(self, step: int, num_steps: int) -> None:
        """Write all of it, in place of what an earlier start wrote."""
        if self.writer is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        for name, column in LOSSES.items():
            folder = Path(self.writer.log_dir) / f"published_{name}"
            points = [(point.step, getattr(point, column)) for point in self.overlay.steps]
            try:
                shutil.rmtree(folder, ignore_errors=True)
                # TensorBoard shows the legend's name of a run, which is its folder.
                with SummaryWriter(str(folder)) as writer:
                    writer.add_text("published", f"{self.overlay.source}; {self.overlay.note}")
                    for at, loss in points:
                        if loss is not None:
                            writer.add_scalar(TRAIN_LOSS, loss, at)
            except OSError as error:
                # A picture is not worth a training.
                logger.warning("cannot write the published curve to %s: %s", folder, error)
