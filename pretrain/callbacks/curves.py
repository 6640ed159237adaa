"""training_curves.png: what happened in a run, on one page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pretrain.callbacks.base import Callback, Row
from pretrain.callbacks.metrics import METRICS, read_rows
from pretrain.core.files import write_synced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "training_curves.png"
# The smoothed curve weighs a row by half as much as one that is a fiftieth of the run newer.
HALF_LIFE_SHARE = 0.02


class Panel(NamedTuple):
    """One plot: the column of the rows of training, how its axis is called, and whether it is noisy
    enough to be smoothed.
    """

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
    """Exponential moving average in which a value's weight halves every ``half_life`` values;
    without a bias towards a start at zero.
    """
    decay = 0.5 ** (1.0 / half_life)
    total = weight = 0.0
    averages = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        averages.append(total / weight)
    return averages


def figure_of(rows: Sequence[Row], title: str) -> Figure:
    """Raw and smoothed values over tokens, and the validation loss beside that of training.

    What no row has is left out.
    """
    from matplotlib.figure import Figure

    train = [row for row in rows if row["kind"] == "train"]
    panels = [
        panel
        for panel in PANELS
        if panel.column == "loss" or any(panel.column in row for row in train)
    ]
    columns = 2 if len(panels) > 1 else 1
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(6.5 * columns, 0.6 + 3.2 * height))
    grid = figure.subplots(height, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.14 / columns,
        right=1 - 0.03 / columns,
        bottom=0.18 / height,
        top=1 - 0.15 / height,
        hspace=0.28,
        wspace=0.2,
    )
    for axes, panel in zip(grid.flat, panels):
        _draw(axes, panel, train)
    validation = [
        (row["tokens"], row["validation_loss"]) for row in rows if row["kind"] == "validation"
    ]
    if validation:
        grid[0, 0].plot(
            *zip(*validation, strict=True),
            "o-",
            color="tab:orange",
            label="validation",
            linewidth=1.2,
            markersize=4,
        )
    if train or validation:
        grid[0, 0].legend(loc="upper right")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    figure.suptitle(title)
    return figure


def _draw(axes: Axes, panel: Panel, train: Sequence[Row]) -> None:
    points: list[tuple[Any, Any]] = [
        (row["tokens"], row[panel.column]) for row in train if panel.column in row
    ]
    tokens, values = [point[0] for point in points], [point[1] for point in points]
    axes.plot(
        tokens,
        values,
        color="tab:blue",
        linewidth=1.0,
        alpha=0.35 if panel.smoothed else 1.0,
        label="train" if panel.smoothed else None,
    )
    if panel.smoothed and points:
        smooth = moving_average(values, max(1.0, HALF_LIFE_SHARE * len(values)))
        axes.plot(tokens, smooth, color="tab:blue", linewidth=1.4, label="train, smoothed")
    axes.set(xlabel="tokens", ylabel=panel.label)
    axes.grid(alpha=0.3)


class TrainingCurves(Callback):
    """Draws the rows of metrics.jsonl when training ends, also by an error."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_end(self, summary: Row) -> None:
        self._draw()

    def on_failure(self, error: Exception) -> None:
        self._draw()

    def _draw(self) -> None:
        content = io.BytesIO()
        figure_of(read_rows(self.folder / METRICS), self.folder.name).savefig(
            content, dpi=100, format="png"
        )
        write_synced(self.folder / CURVES, content.getvalue())
