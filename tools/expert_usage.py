#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Shows how evenly a run uses its experts: a table of layers, the trend over time, a plot."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pretrain.analysis.expert_usage import (
    SCALARS,
    UsageColumns,
    UsageMeans,
    UsageWindow,
    binned,
    load_window,
    log_load,
    lorenz_curve,
    square_grid,
    usage_columns,
    window_path,
    window_steps,
)
from pretrain.config.recipe import LoggingConfig
from pretrain.core.cli import add_json_option, command_parser, write_json
from pretrain.core.errors import ConfigError, run_command
from pretrain.core.figures import save_figure

EXAMPLES = """\
  python tools/expert_usage.py runs/quickstart
  python tools/expert_usage.py runs/quickstart --step 200 --layer 3 --plot usage.png
  python tools/expert_usage.py runs/million/usage/step_000100.npz --hot-factor 10 --json -

exit codes: 0 done, 2 a run, window or layer that is not there, 3 a damaged file,
5 a result that cannot be written"""
TREND_WINDOWS = 20
# Beyond this many layers a legend hides the curves.
NAMED_LAYERS = 10


class TrendPoint(UsageMeans):
    """The means over the layers of the window of ``steps`` steps that ends with ``step``."""

    step: int
    steps: int


class UsageResult(UsageColumns):
    """The command's result as JSON: one window, and the trend that it is part of."""

    path: str
    step: int
    steps: int
    experts: int
    hot_factor: float
    trend: list[TrendPoint]


def parse_arguments() -> argparse.Namespace:
    """The command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN_OR_NPZ",
        help="a run's folder, or one file of its usage/ folder",
    )
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="the window that ends with this step (default: the newest)",
    )
    parser.add_argument(
        "--layer", type=int, action="append", metavar="L", help="only this layer; may be repeated"
    )
    default = LoggingConfig().hot_expert_factor
    parser.add_argument(
        "--hot-factor",
        type=float,
        default=default,
        metavar="M",
        help=f"hot is above M times the mean (default: {default:g})",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help="draw histogram, Lorenz curve and heat map of the window",
    )
    add_json_option(parser)
    return parser.parse_args()


def find_windows(path: Path, step: int | None) -> tuple[Path, list[Path]]:
    """The window to show, and those of the trend.

    The trend has at most ``TREND_WINDOWS`` windows, evenly chosen, and none if a file was given.

    Raises:
        ConfigError: if there is no such run, file or window.
    """
    if path.is_file():
        if step is not None:
            raise ConfigError(
                f"--step {step} chooses a window of a run, but {path} is one window: leave it out,"
                " or give the run's folder"
            )
        return path, []
    if not path.is_dir():
        raise ConfigError(
            f"{path} is not there: give a run's folder, or a file of its usage/ folder"
        )
    steps = window_steps(path / "usage")
    if not steps:
        raise ConfigError(
            f"{path} has no windows of expert usage: a run of a model with experts writes one into"
            f" {path / 'usage'} every logging.usage_interval_steps steps"
        )
    if step is not None and step not in steps:
        nearest = min(steps, key=lambda known: abs(known - step))
        raise ConfigError(
            f"{path} has no window that ends with step {step}: the nearest is --step {nearest}, the"
            f" newest {steps[-1]}"
        )
    # unique: few windows may round to the same index.
    chosen = np.unique(
        np.linspace(0, len(steps) - 1, min(len(steps), TREND_WINDOWS)).round().astype(int)
    )
    return window_path(path / "usage", steps[-1] if step is None else step), [
        window_path(path / "usage", steps[index]) for index in chosen
    ]


def trend(paths: list[Path], layers: list[int] | None, hot_factor: float) -> list[TrendPoint]:
    """The means over the layers of each window."""
    points = []
    for path in tqdm(paths, desc="reading windows", unit="window", delay=5):
        window = load_window(path, layers)
        columns: Mapping[str, object] = usage_columns(window, hot_factor)
        means = {name: columns[name] for name in SCALARS}
        points.append(cast(TrendPoint, {"step": window.step, "steps": window.steps} | means))
    return points


def cells(usage: Mapping[str, Any]) -> list[str]:
    """The table cells of one layer, or of the means over all layers."""
    # A count in one layer is a whole number, a mean over layers is not.
    hot = usage["hot_experts"]
    return [
        f"{hot:,}" if isinstance(hot, int) else f"{hot:,.1f}",
        f"{usage['unused_share']:.2%}",
        f"{usage['gini']:.4f}",
        f"{usage['normalized_entropy']:.4f}",
        f"{usage['max_over_mean']:,.2f}",
    ]


def print_tables(result: UsageResult) -> None:
    """Prints the layers of the window, and the trend if there is one."""
    console = Console()
    factor = result["hot_factor"]
    names = (f"hot (> {factor:g}x)", "unused", "Gini", "entropy / ln E", "max / mean")
    title = (
        f"{result['path']}: {result['experts']:,} experts a layer, {result['steps']} steps up to"
        f" step {result['step']}"
    )
    table = Table("layer", *names, "hottest experts (load)", title=title)
    layers: list[Mapping[str, Any]] = [*result["layers"]]
    for layer in layers:
        hottest = [
            f"{expert} ({load:,.1f}x)"
            for expert, load in zip(layer["hottest"], layer["hottest_load"], strict=True)
        ]
        table.add_row(str(layer["layer"]), *cells(layer), ", ".join(hottest))
    console.print(table)
    if len(result["trend"]) > 1:
        table = Table("step", "steps", *names, title="means over these layers, window by window")
        for point in result["trend"]:
            table.add_row(f"{point['step']:,}", f"{point['steps']:,}", *cells(point))
        console.print(table)


def plot(window: UsageWindow, hot_factor: float, path: Path) -> None:
    """Plots a histogram of loads, Lorenz curves, and a heat map of the experts.

    Raises:
        StorageError: if the plot cannot be written.
    """
    import matplotlib

    # Draws into memory: the default backend may ask for a display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (histogram, lorenz, heat) = pyplot.subplots(1, 3, figsize=(17, 5), layout="constrained")
    colours = pyplot.get_cmap("viridis")(np.linspace(0.0, 0.9, len(window.layers)))
    draw_histogram(histogram, window, hot_factor, colours)
    draw_lorenz(lorenz, window, colours)
    figure.colorbar(draw_heat_map(heat, window, hot_factor), ax=heat, label="log2(1 + load)")
    save_figure(figure, path)


def draw_histogram(panel: Any, window: UsageWindow, hot_factor: float, colours: Any) -> None:
    """How many experts of each layer have which load."""
    loads_LE = window.counts_LE / window.counts_LE.mean(axis=1, keepdims=True)
    edges = np.linspace(0.0, log_load(loads_LE.max(keepdims=True)).item(), 65)
    for layer, colour, loads_E in zip(window.layers, colours, loads_LE, strict=True):
        panel.stairs(
            np.histogram(log_load(loads_E), edges)[0],
            2.0**edges - 1.0,
            color=colour,
            label=f"layer {layer}",
        )
    panel.axvline(hot_factor, color="tab:red", linestyle=":", label="hot")
    # log2(1 + load) keeps unused experts, whose load is 0, in the plot; matplotlib also asks for
    # values left of the axis.
    panel.set_xscale(
        "function",
        functions=(lambda load: np.log2(1.0 + np.maximum(load, 0.0)), lambda log: 2.0**log - 1.0),
    )
    ticks = [0, *(2**power for power in range(int(edges[-1]) + 1))]
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.set(
        xlabel="load, multiples of the mean",
        ylabel="experts",
        yscale="symlog",
        title="experts by load",
    )
    if len(window.layers) <= NAMED_LAYERS:
        panel.legend()


def draw_lorenz(panel: Any, window: UsageWindow, colours: Any) -> None:
    """Which share of the choices the least used experts of each layer have."""
    for colour, counts_E in zip(colours, window.counts_LE, strict=True):
        panel.plot(*lorenz_curve(counts_E), color=colour, linewidth=1.2)
    panel.plot([0, 1], [0, 1], "--", color="tab:gray", linewidth=0.8)
    panel.set(
        xlabel="share of the experts, least used first",
        ylabel="their share of all choices",
        title="Lorenz curve",
    )


def draw_heat_map(panel: Any, window: UsageWindow, hot_factor: float) -> Any:
    """Loads of one layer as a square, or of several layers as rows; returns the image."""
    if len(window.layers) == 1:
        picture = square_grid(window.counts_LE[0])
        places = {"xlabel": "column", "ylabel": "row", "title": "experts, row by row"}
    else:
        picture = np.stack([binned(counts_E) for counts_E in window.counts_LE])
        places = {
            "xlabel": f"experts in {picture.shape[1]} bins",
            "ylabel": "layer",
            "title": "layers and experts",
        }
        panel.set_yticks(range(len(window.layers)), [str(layer) for layer in window.layers])
    panel.set(**places)
    return panel.imshow(
        log_load(picture),
        aspect="auto",
        interpolation="nearest",
        vmin=0.0,
        vmax=float(np.log2(1.0 + hot_factor)),
    )


def main() -> None:
    """The command."""
    arguments = parse_arguments()
    if not arguments.hot_factor > 0:
        raise ConfigError(f"--hot-factor is {arguments.hot_factor:g}: give a number above 0")
    if arguments.plot is not None and arguments.plot.exists():
        raise ConfigError(
            f"{arguments.plot} is there already: choose another --plot path, or remove it"
        )
    shown, others = find_windows(arguments.path, arguments.step)
    window = load_window(shown, arguments.layer)
    result: UsageResult = {
        "path": str(shown),
        "step": window.step,
        "steps": window.steps,
        "experts": window.counts_LE.shape[1],
        "hot_factor": arguments.hot_factor,
        **usage_columns(window, arguments.hot_factor),
        "trend": trend(others, arguments.layer, arguments.hot_factor),
    }
    if arguments.json_path != "-":
        print_tables(result)
    if arguments.plot is not None:
        plot(window, arguments.hot_factor, arguments.plot)
    write_json(result, arguments.json_path)


command = partial(run_command, main)  # moe-expert-usage

if __name__ == "__main__":
    command()
