"""Plots as files of the user's choice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.core.errors import StorageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: Figure, path: Path, *, dpi: int = 120, option: str = "--plot") -> None:
    """Write a figure to the path that an option gives, and close it; its folder is made.

    Raises:
        StorageError: if it cannot be written, or its ending is no format of matplotlib.
    """
    from matplotlib import pyplot  # slow to import, and needed for a plot only

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"cannot write {path}: {error}; choose another {option} path, ending in .png"
        ) from None
    finally:
        pyplot.close(figure)
