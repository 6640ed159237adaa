"""How evenly the experts of each layer are used, and the files that hold the counts.

Without torch, and fast enough for millions of experts.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from pretrain.core.errors import DataError
from pretrain.core.files import write_synced

Counts = NDArray[np.int64]
Numbers = NDArray[np.float64]

HOTTEST = 10
MAX_COLUMNS = 1024
# The figures of a layer that become curves; a metrics record has their means over the layers.
SCALARS = ("hot_experts", "unused_share", "gini", "normalized_entropy", "max_over_mean")


@dataclass(frozen=True)
class LayerUsage:
    """How evenly one layer used its experts in a window. A load is a multiple of the mean count.

    Attributes:
        layer: index of the block; the number of blocks for that of multi-token prediction.
        hot_experts: how many have a load above ``hot_factor``.
        unused_share: share of the experts that no token chose.
        gini: 0 if all are used alike, (E - 1) / E if one expert gets everything.
        normalized_entropy: entropy of the shares / ln E; 1 if all are used alike, 0 if one expert
            gets everything.
        max_over_mean: load of the hottest expert.
        hottest, hottest_load: ids and loads of the ten hottest experts.
    """

    layer: int
    hot_experts: int
    unused_share: float
    gini: float
    normalized_entropy: float
    max_over_mean: float
    hottest: list[int]
    hottest_load: list[float]


@dataclass(frozen=True)
class UsageWindow:
    """How often each expert was chosen, over all ranks.

    Attributes:
        step, steps: the last step of the window, and how many steps it has.
        layers: the index of each layer with experts.
        counts_LE: int64 [L, E], a row for each of ``layers``.
    """

    step: int
    steps: int
    layers: list[int]
    counts_LE: Counts


class UsageMeans(TypedDict):
    """:data:`SCALARS`, each the mean over the layers."""

    hot_experts: float
    unused_share: float
    gini: float
    normalized_entropy: float
    max_over_mean: float


class UsageColumns(UsageMeans):
    """A metrics record's part about experts; ``layers`` has the fields of each LayerUsage."""

    layers: list[dict[str, object]]


def gini(counts_E: Counts) -> float:
    """2 sum_i i x_i / (E sum x) - (E + 1) / E over the counts in rising order, i from 1."""
    size = len(counts_E)
    ranks_E = np.arange(1, size + 1, dtype=np.float64)
    # Counts are far below 2^53: every product is formed in float64, because their sum would
    # overflow int64.
    return float(
        2.0 * (ranks_E @ np.sort(counts_E).astype(np.float64)) / (size * counts_E.sum())
        - (size + 1) / size
    )


def normalized_entropy(counts_E: Counts) -> float:
    """Entropy of the experts' shares / ln E; 1 for a single expert."""
    if len(counts_E) == 1:
        return 1.0
    used = counts_E[counts_E > 0]
    shares = used / used.sum()
    return float(-(shares @ np.log(shares)) / math.log(len(counts_E)))


def hottest(counts_E: Counts, number: int = HOTTEST) -> Counts:
    """Ids of the most chosen experts, the hottest first, and of equals the lower id first.

    Fewer than ``number`` if there are fewer experts.
    """
    # partition is O(E), sorting all counts O(E log E): there may be millions of experts.
    number = min(number, len(counts_E))
    least = np.partition(counts_E, -number)[-number]
    above = np.flatnonzero(counts_E > least)
    above = above[np.argsort(-counts_E[above], kind="stable")]
    return np.concatenate([above, np.flatnonzero(counts_E == least)[: number - len(above)]])


def layer_usage(layer: int, counts_E: Counts, hot_factor: float) -> LayerUsage:
    """The usage of one layer, from counts [E] with at least one choice."""
    mean = counts_E.mean()
    ids = hottest(counts_E)
    return LayerUsage(
        layer=layer,
        hot_experts=int(np.count_nonzero(counts_E > hot_factor * mean)),
        unused_share=float(np.count_nonzero(counts_E == 0) / len(counts_E)),
        gini=gini(counts_E),
        normalized_entropy=normalized_entropy(counts_E),
        max_over_mean=float(counts_E.max() / mean),
        hottest=ids.tolist(),
        hottest_load=(counts_E[ids] / mean).tolist(),
    )


def usage_columns(window: UsageWindow, hot_factor: float) -> UsageColumns:
    """The usage of a window: the means over the layers, and each layer's own figures."""
    layers = [
        layer_usage(layer, counts_E, hot_factor)
        for layer, counts_E in zip(window.layers, window.counts_LE, strict=True)
    ]
    means = {name: sum(getattr(layer, name) for layer in layers) / len(layers) for name in SCALARS}
    return cast(UsageColumns, means | {"layers": [asdict(layer) for layer in layers]})


def log_load(loads: Numbers) -> Numbers:
    """log2(1 + load), the scale of plots: 0 for unused, 1 for the mean, about 1 more a doubling."""
    return np.log2(1.0 + loads)


def lorenz_curve(counts_E: Counts, points: int = 512) -> tuple[Numbers, Numbers]:
    """The share of all choices that go to the least used share of the experts.

    Returns:
        Shares of the experts and of the choices, each with at most ``points`` + 1 elements.
    """
    sums = np.concatenate([[0], np.cumsum(np.sort(counts_E))])
    at = np.unique(
        np.linspace(0, len(counts_E), min(points, len(counts_E)) + 1).round().astype(np.int64)
    )
    return at / len(counts_E), sums[at] / sums[-1]


def square_grid(counts_E: Counts, max_side: int = 64) -> Numbers:
    """Loads as a square image, row by row, with NaN behind the last expert.

    If the side is longer than ``max_side``, a cell is the mean over a square block of experts. With
    two product keys of equal length, a row is a sub-key of the first and a column one of the
    second.
    """
    side = math.isqrt(len(counts_E) - 1) + 1
    block = -(-side // max_side)
    cells = -(-side // block)
    loads = np.full((cells * block, cells * block), np.nan)
    folded = np.full(side * side, np.nan)
    folded[: len(counts_E)] = counts_E / counts_E.mean()
    loads[:side, :side] = folded.reshape(side, side)
    return _means(
        loads.reshape(cells, block, cells, block).swapaxes(1, 2).reshape(cells, cells, -1)
    )


def load_map(counts_LE: Counts, layers: Sequence[int], max_columns: int = MAX_COLUMNS) -> Numbers:
    """One picture of all layers, in multiples of each layer's mean.

    Row l is the model's layer l, NaN if it is dense, and a column is an expert. Above
    ``max_columns`` experts, each layer of ``layers`` is folded by :func:`square_grid` instead, and
    the squares are tiles of the picture, row by row, with a line of NaN between them.
    """
    num_layers, num_experts = counts_LE.shape
    if num_experts <= max_columns:
        loads = np.full((max(layers) + 1, num_experts), np.nan)
        loads[list(layers)] = counts_LE / counts_LE.mean(axis=1, keepdims=True)
        return loads
    tiles = [np.pad(square_grid(counts_E), 1, constant_values=np.nan) for counts_E in counts_LE]
    columns = math.isqrt(num_layers - 1) + 1
    tiles += [np.full_like(tiles[0], np.nan)] * (-num_layers % columns)
    return np.block([tiles[row : row + columns] for row in range(0, len(tiles), columns)])


def binned(counts_E: Counts, max_bins: int = 256) -> Numbers:
    """Mean loads of neighbouring experts, [at most ``max_bins``]."""
    edges = np.linspace(0, len(counts_E), min(max_bins, len(counts_E)) + 1).round().astype(np.int64)
    return np.add.reduceat(counts_E, edges[:-1]) / np.diff(edges) / counts_E.mean()


def _means(cells: Numbers) -> Numbers:
    """Means over the last axis, without NaN; NaN if all elements are."""
    present = np.isfinite(cells)
    numbers = present.sum(axis=-1)
    return np.where(numbers, np.nansum(cells, axis=-1) / np.maximum(numbers, 1), np.nan)


def window_path(folder: Path, step: int) -> Path:
    """The file of the window that ends with ``step``."""
    return folder / f"step_{step:06d}.npz"


def window_steps(folder: Path) -> list[int]:
    """The last steps of all windows in a folder, in order; empty if there is no folder."""
    names = (path.stem.removeprefix("step_") for path in folder.glob("step_*.npz"))
    return sorted(int(name) for name in names if name.isdecimal())


def save_window(folder: Path, window: UsageWindow) -> Path:
    """Writes ``step_000100.npz`` atomically, in the smallest integers that hold the counts."""
    stored = window.counts_LE.astype(np.min_scalar_type(int(window.counts_LE.max())))
    arrays = {
        "step": np.array(window.step),
        "steps": np.array(window.steps),
        "layers": np.array(window.layers),
        "counts_LE": stored,
    }
    content = io.BytesIO()
    # numpy's own savez_compressed takes zlib's level 6: of a million counts 4% smaller, in seven
    # times the time.
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    folder.mkdir(parents=True, exist_ok=True)
    path = window_path(folder, window.step)
    write_synced(path, content.getvalue())
    return path


def load_window(path: Path, layers: Sequence[int] | None = None) -> UsageWindow:
    """What :func:`save_window` wrote, all layers or those named.

    Raises:
        DataError: if the file is no such file, is damaged, or a layer has no choices or is not
            there.
    """
    remedy = "take another window, or a file that a run wrote into its usage/ folder"
    try:
        with np.load(path, allow_pickle=False) as content:
            step, steps, held, counts_LE = (
                content[name] for name in ("step", "steps", "layers", "counts_LE")
            )
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; {remedy}") from None
    except (
        ValueError,
        KeyError,
        AttributeError,
        EOFError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ):
        raise DataError(f"{path} holds no expert usage, or is damaged: {remedy}") from None
    shaped = (
        counts_LE.ndim == 2
        and held.shape == counts_LE.shape[:1]
        and counts_LE.dtype.kind in "iu"
        and step.ndim == steps.ndim == 0
    )
    if (
        not shaped
        or not counts_LE.size
        or int(counts_LE.min()) < 0
        or not counts_LE.any(axis=1).all()
    ):
        raise DataError(f"{path} holds no counts of at least one choice for each layer: {remedy}")
    known = [int(layer) for layer in held]
    for layer in layers or ():
        if layer not in known:
            raise DataError(
                f"{path} has no layer {layer}: its layers of experts are"
                f" {', '.join(map(str, known))}"
            )
    wanted = known if layers is None else list(layers)
    chosen_LE = counts_LE[[known.index(layer) for layer in wanted]]
    return UsageWindow(int(step), int(steps), wanted, chosen_LE.astype(np.int64))
