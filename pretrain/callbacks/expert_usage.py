"""Expert usage on disk and in pictures: a file of counts for each window; in TensorBoard a histogram and a heat map for each layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pretrain.analysis.expert_usage import (
    Numbers,
    UsageWindow,
    log_load,
    save_window,
    square_grid,
    window_path,
    window_steps,
)
from pretrain.callbacks.base import Callback

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PICTURE_SIDE = 256  # pixels, or a little more
HISTOGRAM_BINS = 64


def heat_map(loads: Numbers, hot_factor: float) -> NDArray[np.uint8]:
    """Loads [rows, columns] as a picture [height, width, RGB]: dark blue is unused, yellow hot, black no expert; the scale never changes."""
    from matplotlib import colormaps

    colours = colormaps["viridis"](
        np.ma.masked_invalid(log_load(loads) / math.log2(1.0 + hot_factor)), bytes=True
    )[..., :3]
    repeats = max(1, -(-PICTURE_SIDE // max(loads.shape)))
    pixels: NDArray[np.uint8] = colours.repeat(repeats, axis=0).repeat(repeats, axis=1)
    return pixels


class ExpertUsage(Callback):
    """Saves every window as ``step_000100.npz``; on a resume or rollback, windows beyond the checkpoint are removed, because those steps run again.

    Args:
        writer: the one of DeepSpeed's monitor, None without TensorBoard. A second one in its folder would write a second file, and
            TensorBoard stops looking at the first as soon as it has read on into the second.
        hot_factor: what is brightest in a heat map, in multiples of the mean.
    """

    def __init__(self, folder: Path, writer: SummaryWriter | None, hot_factor: float) -> None:
        self.folder, self.writer, self.hot_factor = folder, writer, hot_factor

    def on_start(self, step: int, num_steps: int) -> None:
        self.on_rollback(step)

    def on_rollback(self, step: int) -> None:
        for last in window_steps(self.folder):
            if last > step:
                window_path(self.folder, last).unlink()
        for torn in self.folder.glob("*.partial"):
            torn.unlink()

    def on_usage(self, window: UsageWindow) -> None:
        save_window(self.folder, window)
        if self.writer is None:
            return
        for layer, counts_E in zip(window.layers, window.counts_LE, strict=True):
            tag = f"usage/layer_{layer:02d}"
            self.writer.add_histogram(
                f"{tag}/log2_1_plus_load",
                log_load(counts_E / counts_E.mean()),
                window.step,
                bins=HISTOGRAM_BINS,
            )
            self.writer.add_image(
                f"{tag}/load",
                heat_map(square_grid(counts_E), self.hot_factor),
                window.step,
                dataformats="HWC",
            )
