#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Runs the ablations of a file of axes, one value at a time or every combination."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from pretrain.core.cli import command_parser
from pretrain.core.errors import ConfigError, run_command
from pretrain.sweeps.axes import read_axes_file
from pretrain.sweeps.command import design_from, run_sweep
from pretrain.sweeps.mixes import AXIS as DATA_MIX
from pretrain.sweeps.mixes import read_custom_datasets
from pretrain.sweeps.options import EXIT_CODES, add_sweep_options
from pretrain.sweeps.study import Design

EXAMPLES = f"""\
  python tools/run_ablations.py moe --set parallel.ep_size=1 --tokens 200000 --output ablations/moe
  python tools/run_ablations.py moe --axes num_experts top_k --mode grid --skip-invalid \\
      --ranks 2 --output ablations/grid --slots 2
  python tools/run_ablations.py peer_mla --axes product heads_by_top_k --tokens 5000000000 \\
      --ranks 8 --output ablations/peer --slurm
  python tools/run_ablations.py peer_mla_mini --output ablations/mini
  python tools/run_ablations.py --recipe my_recipe.yaml --custom-datasets my_mixes.yaml \\
      --axes data_mix --gpus 2 --output ablations/mixes
  python tools/run_ablations.py my_axes.yaml --recipe my_recipe.yaml --seeds 1 2 3 \\
      --output ablations/mine
  python tools/run_ablations.py --output ablations/moe

An axes file has 'base:', a recipe, and 'axes:'; of each axis every value is a set of fields. A file
of data sets has 'data:', fields of the recipe's data section, and 'mixes:', named mixtures:
  data: {{corpora: {{web: data/web, code: data/code}}}}
  mixes: {{web: {{web: 0.8, code: 0.2}}, balanced: {{web: 0.5, code: 0.5}}}}
{EXIT_CODES}"""


def parse_arguments() -> argparse.Namespace:
    """The command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument(
        "file",
        nargs="?",
        metavar="AXES",
        help="a file in pretrain/recipes/axes/ without .yaml, or a path",
    )
    parser.add_argument(
        "--recipe", "--base-config", metavar="NAME|PATH", help="instead of the file's base"
    )
    parser.add_argument("--axes", nargs="+", metavar="NAME", help="only these axes of the file")
    parser.add_argument(
        "--mode",
        choices=("each", "grid"),
        help="one axis at a time, or every combination (default: each)",
    )
    parser.add_argument(
        "--custom-datasets",
        metavar="FILE",
        help="data sets of every run, and their mixtures as the axis data_mix (replaces the file's)",
    )
    add_sweep_options(parser)
    return parser.parse_args()


def design(options: argparse.Namespace) -> Design | None:
    """The ablation that the options describe; None if only the folder is given."""
    custom = options.custom_datasets
    if options.file is None and custom is None:
        if options.recipe or options.axes:
            raise ConfigError(
                "an ablation needs a file of axes: name one of pretrain/recipes/axes/, or give a"
                " path"
            )
        return None
    base, axes = read_axes_file(options.file) if options.file else (None, {})
    if custom is not None:
        overrides, axes[DATA_MIX] = read_custom_datasets(custom)
        # What is given on the command line comes later, and counts.
        options.overrides = [*overrides, *(options.overrides or [])]
    recipe = options.recipe or base
    if recipe is None:
        raise ConfigError(
            f"{options.file} names no base recipe: add 'base:' to it, or give --recipe"
            if options.file
            else "an ablation of data mixtures needs a recipe: give --recipe, or a file of axes"
        )
    for name in options.axes or []:
        if name not in axes:
            raise ConfigError(
                f"{options.file or custom} has no axis '{name}': it has {', '.join(map(str, axes))}"
            )
    chosen = {name: spec for name, spec in axes.items() if not options.axes or name in options.axes}
    return design_from(options, "ablation", recipe, chosen, options.mode or "each")


def main() -> int:
    """The command; returns its exit code."""
    options = parse_arguments()
    return run_sweep(options, design(options), Path(__file__).resolve())


command = partial(run_command, main)  # moe-ablations

if __name__ == "__main__":
    command()
