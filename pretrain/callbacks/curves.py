"""training_curves.png: what happened in a run, on one page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pretrain.callbacks.base import Callback, Row
from pretrain.callbacks.metrics import METRICS, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = "training_curves.png"
# The smoothed curve weighs a row by half as much as one that is a fiftieth of the run newer.
HALF_LIFE_SHARE = 0.02


class Panel(NamedTuple):
    """One plot: the column of the rows of training, how its axis is called, and whether it is noisy enough to be smoothed."""

    column: str
    label: str
    smoothed: bool = False


PANELS = (
    Panel("loss", "cross-entropy, nats a token", smoothed=True),
    Panel("learning_rate", "learning rate"),
    Panel("grad_norm", "gradient norm before clipping", smoothed=True),
    Panel("tokens_per_second", "tokens/s", smoothed=True),
    Panel("router_entropy", "router entropy, nats", smoothed=True),
    Panel("max_violation", "MaxVio (busiest expert / mean - 1)", smoothed=True),
)


def moving_average(values: Sequence[float], half_life: float) -> list[float]:
    """Exponential moving average in which a value's weight halves every ``half_life`` values; without a bias towards a start at zero."""
    decay = 0.5 ** (1.0 / half_life)
    total = weight = 0.0
    averages = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        averages.append(total / weight)
    return averages


def draw_curves(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draws raw and smoothed values over tokens, and the validation loss beside that of training. What no row has is left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = [row for row in rows if row["kind"] == "train"]
    panels = [panel for panel in PANELS if panel.column == "loss" or any(panel.column in row for row in train)]
    columns = 2 if len(panels) > 1 else 1
    height = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(height, columns, figsize=(6.5 * columns, 3.2 * height), layout="constrained", squeeze=False)
    try:
        for axes, panel in zip(grid.flat, panels):
            _draw(axes, panel, train)
        validation = [(row["tokens"], row["validation_loss"]) for row in rows if row["kind"] == "validation"]
        if validation:
            grid[0, 0].plot(*zip(*validation, strict=True), "o-", color="tab:orange", label="validation", linewidth=1.2, markersize=4)
        if train or validation:
            grid[0, 0].legend()
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        figure.suptitle(title)
        temporary = path.with_name(f".{path.name}")
        figure.savefig(temporary, dpi=100, format="png")
        os.replace(temporary, path)
    finally:
        pyplot.close(figure)


def _draw(axes: Axes, panel: Panel, train: Sequence[Row]) -> None:
    points: list[tuple[Any, Any]] = [(row["tokens"], row[panel.column]) for row in train if panel.column in row]
    tokens, values = [point[0] for point in points], [point[1] for point in points]
    axes.plot(tokens, values, color="tab:blue", linewidth=1.0, alpha=0.35 if panel.smoothed else 1.0, label="train" if panel.smoothed else None)
    if panel.smoothed and points:
        smooth = moving_average(values, max(1.0, HALF_LIFE_SHARE * len(values)))
        axes.plot(tokens, smooth, color="tab:blue", linewidth=1.4, label="train, smoothed")
    axes.set(xlabel="tokens", ylabel=panel.label)
    axes.grid(alpha=0.3)


class TrainingCurves(Callback):
    """Draws the rows of metrics.jsonl when training ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_end(self) -> None:
        draw_curves(read_rows(self.folder / METRICS), self.folder.name, self.folder / CURVES)
