#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Searches for good values of recipe fields by a grid, random points or tpe, and ranks the runs."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from pretrain.core.cli import add_recipe_option, command_parser
from pretrain.core.errors import ConfigError, run_command
from pretrain.sweeps.axes import parse_axis_option, read_axes_file
from pretrain.sweeps.command import design_from, run_sweep
from pretrain.sweeps.options import EXIT_CODES, add_sweep_options
from pretrain.sweeps.study import Design

EXAMPLES = f"""\
  python tools/sweep.py --recipe quickstart --set parallel.ep_size=1 --tokens 200000 \\
      --output sweeps/lr --axis optimizer.learning_rate=log:5e-4:8e-3:5 --seeds 1 2 3
  python tools/sweep.py --recipe quickstart --set parallel.ep_size=1 --output sweeps/tpe \\
      --search tpe --trials 20 --prune --slots 2 \\
      --axis optimizer.learning_rate=log:1e-4:1e-2 --axis model.moe.top_k=[1,2,4] \\
      --axis optimizer.beta2=linear:0.9:0.99
  python tools/sweep.py --recipe moe_1b --ranks 8 --axes-file my_axes.yaml --output sweeps/wide \\
      --slurm && sbatch sweeps/wide/array.sbatch
  python tools/sweep.py --output sweeps/lr

axes: NAME=[A,B,C] lists values of a field; NAME=log:LOW:HIGH:COUNT, linear: and int: are ranges,
whose COUNT only a grid needs. A file has 'axes:' with one axis a line, and may name sets of fields:
see pretrain/recipes/axes/.
{EXIT_CODES}"""
SEARCHES = ("grid", "random", "tpe")


def parse_arguments() -> argparse.Namespace:
    """The command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    add_recipe_option(
        parser, help="what is varied: a file in pretrain/recipes/ without .yaml, or a path"
    )
    parser.add_argument(
        "--axis",
        action="append",
        default=[],
        metavar="FIELD=VALUES",
        help="what to vary; may be repeated",
    )
    parser.add_argument(
        "--axes-file",
        metavar="NAME|PATH",
        help="a file of axes; --axis adds to it and replaces its axes of the same name",
    )
    parser.add_argument(
        "--search",
        choices=SEARCHES,
        help="every combination, random points, or tpe, which learns (default: grid)",
    )
    parser.add_argument(
        "--trials", type=int, metavar="N", help="points of a random or tpe search (default: 16)"
    )
    parser.add_argument(
        "--search-seed", type=int, metavar="N", help="seed of a random or tpe search (default: 0)"
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        default=None,
        help="end runs early that are worse than the median of finished ones at the same step",
    )
    add_sweep_options(parser)
    return parser.parse_args()


def design(options: argparse.Namespace) -> Design | None:
    """The sweep that the options describe; None if only the folder is given."""
    base, listed = read_axes_file(options.axes_file) if options.axes_file else (None, {})
    axes = listed | dict(parse_axis_option(text) for text in options.axis)
    recipe = options.recipe or base
    if not axes and recipe is None:
        return None
    if not axes or recipe is None:
        raise ConfigError(
            "a sweep needs a recipe and at least one axis: give --recipe and --axis, or --axes-file"
        )
    search = options.search or "grid"
    trials = 16 if options.trials is None else options.trials
    if trials < 1:
        raise ConfigError(f"--trials {trials} must be at least 1")
    return design_from(options, "sweep", recipe, axes, search, 0 if search == "grid" else trials)


def main() -> int:
    """The command; returns its exit code."""
    options = parse_arguments()
    return run_sweep(options, design(options), Path(__file__).resolve())


command = partial(run_command, main)  # moe-sweep

if __name__ == "__main__":
    command()
