"""training_curves.png: what happened in a run, on one page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pretrain.callbacks.base import Callback, MetricsRecord, Summary
from pretrain.callbacks.metrics import METRICS, read_records
from pretrain.callbacks.published import Overlay
from pretrain.core.files import write_synced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = "training_curves.png"
# Half-life of a record's weight in a smoothed curve, as a share of the run.
HALF_LIFE_SHARE = 0.02


class Panel(NamedTuple):
    """One plot.

    Attributes:
        column: of the training records.
        label: of the vertical axis.
        smoothed: whether the values are noisy enough to be smoothed.
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
    """Average exponentially: the weight of a value halves every ``half_life`` values.

    Dividing by the sum of the weights avoids a bias towards a start at zero.
    """
    decay = 0.5 ** (1.0 / half_life)
    total = 0.0
    weight = 0.0
    averages = []
    for value in values:
        total = decay * total + value
        weight = decay * weight + 1.0
        averages.append(total / weight)
    return averages


def figure_of(
    records: Sequence[MetricsRecord], title: str, overlay: Overlay | None = None
) -> Figure:
    """Draw raw and smoothed values over tokens, and the validation loss next to that of training.

    Columns that no record has are left out.

    Args:
        overlay: a published curve, in the panel of the loss up to the run's own tokens.
    """
    from matplotlib.figure import Figure  # slow to import, and only rank 0 draws

    train = [record for record in records if record["kind"] == "train"]
    panels = [
        panel
        for panel in PANELS
        if panel.column == "loss" or any(panel.column in record for record in train)
    ]
    # Two columns, and as many lines as that takes.
    columns = 2 if len(panels) > 1 else 1
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(6.5 * columns, 0.6 + 3.2 * height))
    grid = figure.subplots(height, columns, squeeze=False)
    # Margins in inches, whatever the number of plots.
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
        (record["tokens"], record["validation_loss"])
        for record in records
        if record["kind"] == "validation"
    ]
    # The validation loss joins the panel of the training loss, whose unit it has.
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
        if overlay is not None:
            reached = max(record["tokens"] for record in records if "tokens" in record)
            _draw_published(grid[0, 0], overlay, reached)
        grid[0, 0].legend(loc="upper right")
    # An odd number of panels leaves one place empty.
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    figure.suptitle(title)
    return figure


def _draw(axes: Axes, panel: Panel, train: Sequence[MetricsRecord]) -> None:
    points = [record for record in train if panel.column in record]
    tokens = [record["tokens"] for record in points]
    values = [record[panel.column] for record in points]
    axes.plot(
        tokens,
        values,
        color="tab:blue",
        linewidth=1.0,
        alpha=0.35 if panel.smoothed else 1.0,
        label="train" if panel.smoothed else None,
    )
    # The raw values stay visible behind the smoothed ones: a spike must not be averaged away.
    if panel.smoothed and points:
        smooth = moving_average(values, max(1.0, HALF_LIFE_SHARE * len(values)))
        axes.plot(tokens, smooth, color="tab:blue", linewidth=1.4, label="train, smoothed")
    axes.set(xlabel="tokens", ylabel=panel.label)
    axes.grid(alpha=0.3)


def _draw_published(axes: Axes, overlay: Overlay, reached: int) -> None:
    """Draw a published curve in dashes, without letting it change the run's own axis of tokens."""
    left, right = axes.get_xlim()
    # A dollar begins a formula.
    source = overlay.source.replace("$", r"\$")
    for name, color in (("train", "tab:blue"), ("validation", "tab:orange")):
        points = overlay.points(name)
        if points:
            axes.plot(
                *zip(*points, strict=True),
                "--",
                marker="s",
                color=color,
                alpha=0.7,
                label=f"{source}: {name}",
                linewidth=1.0,
                markersize=4,
            )
    axes.set_xlim(left, max(right, reached))
    axes.set_title(overlay.note, fontsize="x-small", loc="left")


class TrainingCurves(Callback):
    """Draws the records of metrics.jsonl when training ends, also by an error.

    Args:
        overlay: a published curve that is drawn with them.
    """

    def __init__(self, folder: Path, overlay: Overlay | None = None) -> None:
        self.folder = folder
        self.overlay = overlay

    def on_end(self, summary: Summary) -> None:
        """Draw."""
        self._draw()

    def on_failure(self, error: Exception) -> None:
        """Draw what there is."""
        self._draw()

    def _draw(self) -> None:
        content = io.BytesIO()
        records = read_records(self.folder / METRICS)
        figure = figure_of(records, self.folder.name, self.overlay)
        figure.savefig(content, dpi=100, format="png")
        write_synced(self.folder / CURVES, content.getvalue())
