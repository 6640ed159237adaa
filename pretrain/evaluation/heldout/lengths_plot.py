"""A plot of the loss at several context lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pretrain.evaluation.result import LengthScore, LengthsResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


def lengths_figure(result: LengthsResult, title: str) -> Figure:
    """Draw the loss by context length, and by position in the longest context."""
    from matplotlib.figure import Figure  # slow to import, and needed for a plot only

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    draw_lengths(figure, result)
    figure.suptitle(title)
    return figure


def draw_lengths(figure: Figure | SubFigure, result: LengthsResult) -> None:
    """Draw both into a figure, or into a part of one."""
    by_length, by_position = figure.subplots(1, 2)
    _draw_lengths(by_length, result["variants"])
    _draw_positions(by_position, result["variants"])
    for axes in (by_length, by_position):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        if result["trained_length"] is not None:
            axes.axvline(
                result["trained_length"],
                color="tab:gray",
                linestyle=":",
                label="trained length",
            )
        axes.legend()


def _shown(name: str) -> str:
    # Dollars would begin a formula, an underscore hide the line from the legend.
    return " " * name.startswith("_") + name.replace("$", r"\$")


def _draw_lengths(axes: Axes, variants: Mapping[str, Mapping[str, LengthScore]]) -> None:
    for name, scores in variants.items():
        # Without standard errors: all points are of the same text, which most of their error is of.
        axes.plot(
            [int(length) for length in scores],
            [score["loss"] for score in scores.values()],
            marker="o",
            label=_shown(name),
        )
    axes.set(xlabel="context, tokens", ylabel="loss, nats a token")


def _draw_positions(axes: Axes, variants: Mapping[str, Mapping[str, LengthScore]]) -> None:
    longest = ""
    for name, scores in variants.items():
        longest, score = list(scores.items())[-1]
        groups = score["by_position"]
        # Positions count from 0; the middle of a group that doubles is at 3/4 of its end.
        ends = [[int(end) for end in places.split(" to ")] for places in groups]
        middles = [(first + last) / 2 + 1 for first, last in ends]
        losses = [group["loss"] for group in groups.values()]
        axes.plot(middles, losses, marker="o", label=_shown(name))
    axes.set(xlabel=f"position in a context of {longest} tokens", ylabel="loss, nats a token")
