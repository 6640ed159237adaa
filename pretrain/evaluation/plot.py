"""The plot of an evaluation: context lengths, needles, or both below each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.evaluation.heldout.lengths_plot import draw_lengths
from pretrain.evaluation.needle.plot import draw_needles
from pretrain.evaluation.result import EvaluationResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_INCHES, PART_INCHES = 12, 4.8


def evaluation_figure(result: EvaluationResult, title: str) -> Figure:
    """Draw the parts of a result that have a plot; at least one has to be there."""
    from matplotlib.figure import Figure  # slow to import, and needed for a plot only

    parts = [part for part in ("lengths", "needles") if part in result]
    figure = Figure(figsize=(WIDTH_INCHES, PART_INCHES * len(parts)), layout="constrained")
    rows = figure.subfigures(len(parts), 1, squeeze=False)[:, 0]
    for part, row in zip(parts, rows, strict=True):
        if part == "lengths":
            draw_lengths(row, result["lengths"])
        else:
            draw_needles(row, result["needles"])
    figure.suptitle(title)
    return figure
