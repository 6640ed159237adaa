"""Expert usage on disk and in pictures.

A file of counts for each window; in TensorBoard and in trackers one heat map and one histogram for
the whole model, however many layers and experts it has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pretrain.analysis.expert_usage import (
    Numbers,
    UsageWindow,
    load_map,
    log_load,
    save_window,
    window_path,
    window_steps,
)
from pretrain.callbacks.base import Callback

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PICTURE_SIDE = 512  # pixels, or a little more
HISTOGRAM_BINS = 64
HISTOGRAM = "usage/log2_1_plus_load"
HEAT_MAP = "usage/load_by_layer"


@dataclass(frozen=True)
class UsageFigures:
    """A window of expert usage in pictures, for trackers.

    Attributes:
        counts, edges: int64 [bins] and float64 [bins + 1], the histogram of log2(1 + load) over
            all experts of all layers.
        heat_map: uint8 [height, width, RGB], see :func:`heat_map`.
    """

    step: int
    counts: NDArray[np.int64]
    edges: Numbers
    heat_map: NDArray[np.uint8]


def usage_figures(window: UsageWindow, hot_factor: float) -> UsageFigures:
    """Draw a window.

    Args:
        hot_factor: the load that is brightest in the heat map, in multiples of the mean.
    """
    counts, edges = np.histogram(_log_loads(window), bins=HISTOGRAM_BINS)
    picture = heat_map(load_map(window.counts_LE, window.layers), hot_factor)
    return UsageFigures(window.step, counts.astype(np.int64), edges, picture)


def _log_loads(window: UsageWindow) -> Numbers:
    """Loads in multiples of the layer's mean, which compare between any numbers of experts."""
    return log_load(window.counts_LE / window.counts_LE.mean(axis=1, keepdims=True))


def heat_map(loads: Numbers, hot_factor: float) -> NDArray[np.uint8]:
    """Draw loads [rows, columns] as a picture [height, width, RGB].

    Dark blue is unused, yellow hot, black no expert. The scale never changes, so that pictures of
    different steps compare.
    """
    from matplotlib import colormaps  # slow to import, and only rank 0 draws

    # NaN marks a place without an expert, such as a dense layer.
    shades = np.ma.masked_invalid(log_load(loads) / math.log2(1.0 + hot_factor))
    colours = colormaps["viridis"](shades, bytes=True)[..., :3]
    # How often a load is repeated in each direction, so that one expert is more than one pixel.
    rows, columns = (max(1, -(-PICTURE_SIDE // size)) for size in loads.shape)
    pixels: NDArray[np.uint8] = colours.repeat(rows, axis=0).repeat(columns, axis=1)
    return pixels


class ExpertUsage(Callback):
    """Saves every window as ``step_000100.npz`` and draws it in TensorBoard.

    On a resume or rollback, windows beyond the checkpoint are removed: those steps run again.

    Args:
        folder: for the files.
        writer: the one of DeepSpeed's monitor; None without TensorBoard. A second writer in its
            folder would write a second file, and TensorBoard stops reading the first as soon as it
            has started with the second.
        hot_factor: the load that is brightest in a heat map, in multiples of the mean.
    """

    def __init__(self, folder: Path, writer: SummaryWriter | None, hot_factor: float) -> None:
        self.folder = folder
        self.writer = writer
        self.hot_factor = hot_factor

    def on_start(self, step: int, num_steps: int) -> None:
        """Remove windows beyond step ``step``."""
        self.on_rollback(step)

    def on_rollback(self, step: int) -> None:
        """Remove windows beyond step ``step``, and files that a kill has torn."""
        for last in window_steps(self.folder):
            if last > step:
                window_path(self.folder, last).unlink()
        for torn in self.folder.glob("*.partial"):
            torn.unlink()

    def on_usage(self, window: UsageWindow) -> None:
        """Save the window, and draw it if there is TensorBoard."""
        save_window(self.folder, window)
        if self.writer is None:
            return
        self.writer.add_histogram(HISTOGRAM, _log_loads(window), window.step, bins=HISTOGRAM_BINS)
        picture = heat_map(load_map(window.counts_LE, window.layers), self.hot_factor)
        self.writer.add_image(HEAT_MAP, picture, window.step, dataformats="HWC")
