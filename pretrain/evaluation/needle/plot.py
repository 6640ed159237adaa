"""Heat maps of retrieval by context length and depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pretrain.evaluation.result import NeedleResult, NeedleScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage

# A cell has room for its number up to so many columns.
NUMBERED_COLUMNS = 12


def draw_needles(figure: Figure | SubFigure, result: NeedleResult) -> None:
    """Draw a heat map of each variant: the share of needles that were found, red to green."""
    variants = result["variants"]
    grid = figure.subplots(1, len(variants), sharey=True, squeeze=False)[0]
    image: AxesImage | None = None
    for axes, (name, by_length) in zip(grid, variants.items(), strict=True):
        image = _draw(axes, name, by_length)
    grid[0].set_ylabel("depth of the needle")
    assert image is not None
    figure.colorbar(image, ax=list(grid), label="found", shrink=0.9)


def _draw(axes: Axes, name: str, by_length: Mapping[str, Mapping[str, NeedleScore]]) -> AxesImage:
    lengths, depths = list(by_length), list(next(iter(by_length.values())))
    found = [[by_length[length][depth]["accuracy"] for length in lengths] for depth in depths]
    image = axes.imshow(found, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(depths)), depths)
    # Dollars would begin a formula.
    axes.set_title(name.replace("$", r"\$"), fontsize=10)
    axes.set_xlabel("context, tokens")
    if len(lengths) <= NUMBERED_COLUMNS:
        for row, values in enumerate(found):
            for column, value in enumerate(values):
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
    return image
