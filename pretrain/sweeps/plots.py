"""Plots of a sweep, as PNG in memory."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from pretrain.sweeps.axes import Axis
from pretrain.sweeps.results import GroupResult

# Beyond this many points their names hide the plot.
NAMED_POINTS = 24
DPI = 120


def _perplexity_error(entries: Sequence[GroupResult]) -> list[list[float]]:
    """How far one standard deviation of the loss reaches below and above each perplexity."""
    pairs = [(entry.perplexity, entry.spread or 0.0) for entry in entries]
    # Perplexity is exp(loss): an interval that is symmetric in the loss is not in the perplexity.
    below = [value * (1.0 - math.exp(-spread)) for value, spread in pairs]
    above = [value * (math.exp(spread) - 1.0) for value, spread in pairs]
    return [below, above]


def _saved(figure: Any) -> bytes:
    from matplotlib import pyplot

    memory = io.BytesIO()
    figure.savefig(memory, dpi=DPI, format="png")
    pyplot.close(figure)
    return memory.getvalue()


def _pyplot() -> Any:
    import matplotlib

    # Draws into memory: the default backend may ask for a display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_sizes(ranked: Sequence[GroupResult], sizes: Sequence[float], label: str) -> bytes:
    """Perplexity against a size of the model, with the line of points that no smaller one beats.

    Args:
        sizes: of each entry of ``ranked``; the x axis, called ``label``.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    values = [entry.perplexity for entry in ranked]
    axes.errorbar(
        sizes,
        values,
        yerr=_perplexity_error(ranked),
        fmt="o",
        markersize=5,
        capsize=3,
        elinewidth=0.8,
    )
    # A mean over fewer seeds may be too good: the diverged ones are missing in it.
    whole = [
        (size, entry.perplexity)
        for entry, size in zip(ranked, sizes, strict=True)
        if entry.is_complete
    ]
    _add_front(axes, _front(whole or list(zip(sizes, values, strict=True))))
    _name_points(axes, ranked, sizes, values)
    axes.set(xlabel=label, ylabel="validation perplexity")
    return _saved(figure)


def _add_front(axes: Any, front: Sequence[tuple[float, float]]) -> None:
    """Add the line of the best value up to each size."""
    axes.plot(
        *zip(*front, strict=True),
        color="tab:gray",
        linewidth=0.8,
        linestyle="--",
        drawstyle="steps-post",
        label="best up to this size",
    )


def _name_points(
    axes: Any, ranked: Sequence[GroupResult], sizes: Sequence[float], values: Sequence[float]
) -> None:
    """Write the name of each point next to it if there are few, and set scale, grid and legend."""
    if len(ranked) <= NAMED_POINTS:
        for entry, size, value in zip(ranked, sizes, values, strict=True):
            axes.annotate(
                entry.point, (size, value), textcoords="offset points", xytext=(5, 4), fontsize=7
            )
    if max(sizes) > 1.5 * min(sizes):
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_scores(ranked: Sequence[GroupResult], scores: Sequence[float], label: str) -> bytes:
    """A score of a benchmark against all parameters, with the line of the best up to each size.

    Args:
        scores: of each entry of ``ranked``, more is better; the y axis, called ``label``.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    sizes = [entry.parameters_total for entry in ranked]
    axes.plot(sizes, scores, "o", markersize=5)
    # The front of the negated scores: there, less is better.
    front = [(size, -value) for size, value in _front([(x, -y) for x, y in zip(sizes, scores)])]
    _add_front(axes, front)
    _name_points(axes, ranked, sizes, scores)
    axes.set(xlabel="parameters", ylabel=label)
    return _saved(figure)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (size, perplexity) pairs that are better than every smaller one, by size."""
    front: list[tuple[float, float]] = []
    for size, value in sorted(points):
        if not front or value < front[-1][1]:
            front.append((size, value))
    return front


def draw_axes(groups: Sequence[GroupResult], axes: Sequence[Axis], against_base: bool) -> bytes:
    """Perplexity by the value of each axis, one panel an axis.

    Args:
        against_base: draw the base recipe's perplexity as a line.
    """
    pyplot = _pyplot()
    columns = min(3, len(axes))
    rows = -(-len(axes) // columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 4 * rows), layout="constrained", squeeze=False
    )
    base = next(
        (
            entry.perplexity
            for entry in groups
            if not any(value is not None for value in entry.values.values())
        ),
        None,
    )
    for axis, panel in zip(axes, panels.flat, strict=False):
        entries = [entry for entry in groups if entry.values.get(axis.name) is not None]
        if entries:
            _draw_axis(panel, axis, entries)
        if against_base and base is not None:
            panel.axhline(base, color="tab:gray", linewidth=0.8, linestyle="--", label="base")
            panel.legend()
        panel.set(xlabel=axis.name, ylabel="validation perplexity")
        panel.grid(alpha=0.3)
    # The grid of panels may have more cells than there are axes.
    for panel in list(panels.flat)[len(axes) :]:
        panel.set_visible(False)
    return _saved(figure)


def _draw_axis(panel: Any, axis: Axis, entries: Sequence[GroupResult]) -> None:
    """Draws numbers on a scale, and named values at equal distances."""
    numeric = all(axis.name in entry.numbers for entry in entries)
    places: list[float]
    if numeric:
        places = [entry.numbers[axis.name] for entry in entries]
        if axis.scale == "log":
            panel.set_xscale("log")
    else:
        labels = [option.label for option in axis.options]
        places = [labels.index(entry.values[axis.name] or "") for entry in entries]
        panel.set_xticks(
            range(len(labels)), labels, rotation=30 if max(map(len, labels)) > 8 else 0
        )
    panel.errorbar(
        places,
        [entry.perplexity for entry in entries],
        yerr=_perplexity_error(entries),
        fmt="o",
        markersize=5,
        capsize=3,
    )
