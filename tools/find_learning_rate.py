#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Finds a learning rate by a range test (Smith 2017).

The test is a short training whose learning rate grows until the loss diverges. It is started like a
training, by Python or any launcher. It saves nothing but its plot, and leaves checkpoints as they
are.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import TypedDict

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from tqdm import tqdm

from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.core.cli import add_json_option, add_recipe_options, command_parser, write_json
from pretrain.core.errors import DONE, ConfigError, run_command
from pretrain.core.files import write_synced
from pretrain.engine.ds_config import read_ds_config
from pretrain.engine.topology import disconnect
from pretrain.run.arguments import add_launcher_options
from pretrain.run.folder import prints_to_log
from pretrain.run.lr_finder import (
    FEWEST_STEPS,
    RangeTest,
    draw,
    learning_rates,
    prepare,
    run_range_test,
)

EXAMPLES = """\
  python tools/find_learning_rate.py --recipe quickstart --set parallel.ep_size=1
  deepspeed --num_accelerators 2 tools/find_learning_rate.py --recipe quickstart \\
    --from 1e-5 --to 1 --steps 200
  python tools/find_learning_rate.py --recipe debug --plot lr.png --json -

The suggestion is the lower one of two: where the smoothed loss falls fastest, and a tenth of where
it diverges. It holds for the peak of a schedule with a warm-up, for this batch size; a longer run
may want less.

exit codes: 0 done, 2 usage or a picture that is there already, 3 data,
4 the checkpoint of initial_weights, 5 disk"""
PLOT = "learning_rate.png"


class RangeTestResult(TypedDict):
    """The command's result as JSON; a learning rate that was not found is None."""

    recipe: str
    learning_rate_in_recipe: float
    suggestion: float | None
    steepest: float | None
    diverged: float | None
    learning_rates: list[float]
    losses: list[float]
    smoothed: list[float]
    plot: str


def parse_arguments() -> argparse.Namespace:
    """The command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    add_recipe_options(parser)
    add_launcher_options(parser)
    parser.add_argument(
        "--from",
        dest="low",
        type=float,
        default=1e-6,
        metavar="LR",
        help="of the first step (default: 1e-6)",
    )
    parser.add_argument(
        "--to",
        dest="high",
        type=float,
        default=1.0,
        metavar="LR",
        help="of the last step (default: 1)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=100,
        metavar="N",
        help="optimizer steps, fewer if the loss diverges before (default: 100)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help=f"the picture (default: {PLOT} in the run's folder)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the picture of an earlier test"
    )
    add_json_option(parser)
    return parser.parse_args()


def check(options: argparse.Namespace, recipe: Recipe) -> Path:
    """The path of the plot.

    Raises:
        ConfigError: if the range is empty, or the plot is there already.
    """
    if not 0 < options.low < options.high:
        raise ConfigError(
            f"--from {options.low:g} --to {options.high:g}: "
            "the first must be above 0 and below the second"
        )
    if options.steps < FEWEST_STEPS:
        raise ConfigError(
            f"--steps {options.steps} are too few to see a slope: take at least {FEWEST_STEPS}"
        )
    path: Path = options.plot or Path(recipe.output_path) / PLOT
    if path.exists() and not options.overwrite:
        raise ConfigError(f"{path} is there already: add --overwrite, or choose another --plot")
    return path


def result_of(test: RangeTest, recipe: Recipe, plot: Path) -> RangeTestResult:
    """What ``--json`` writes."""
    return {
        "recipe": recipe.name,
        "learning_rate_in_recipe": recipe.optimizer.learning_rate,
        "suggestion": test.suggestion,
        "steepest": test.steepest,
        "diverged": test.diverged,
        "learning_rates": test.learning_rates,
        "losses": test.losses,
        "smoothed": test.smoothed,
        "plot": str(plot),
    }


def sentences(
    test: RangeTest, options: argparse.Namespace, recipe: Recipe, plot: Path
) -> list[str]:
    """What the test found, for the terminal."""
    if not test.losses:
        return [
            f"no suggestion: at the first step already, at {options.low:g}, "
            "the loss or its gradient is not finite; look at data and recipe"
        ]
    found = []
    if test.suggestion is None:
        found.append(
            f"no suggestion: the loss falls nowhere between {options.low:g} and {options.high:g}; "
            "try a lower --from and more --steps"
        )
    else:
        now = recipe.optimizer.learning_rate
        found.append(f"suggested learning rate {test.suggestion:.2g} (the recipe has {now:.2g})")
    if test.steepest is not None:
        found.append(f"the loss falls fastest at {test.steepest:.2g}")
    if test.diverged is not None:
        found.append(f"it diverges at {test.diverged:.2g}")
    else:
        last = test.learning_rates[-1]
        found.append(f"it has not diverged up to {last:.2g}: a higher --to would show where")
    return [*found, f"the curve is in {plot}"]


def main() -> int:
    """The command; returns its exit code."""
    options = parse_arguments()
    recipe = load_recipe(options.recipe, options.overrides)
    plot = check(options, recipe)
    ds_config = read_ds_config(options.ds_config)
    rates = learning_rates(options.low, options.high, options.steps)
    # No log file: the test must not write into the run's folder. Without any handler Python would
    # print warnings to standard error.
    logging.getLogger().addHandler(logging.NullHandler())
    with prints_to_log():
        run = prepare(recipe, ds_config, options.ds_config, len(rates))
    is_main = run.resolved.topology.is_main
    with tqdm(
        total=len(rates), unit="step", desc="range test", disable=not is_main, dynamic_ncols=True
    ) as bar:

        def show(rate: float, loss: float) -> None:
            bar.set_postfix_str(f"lr={rate:.2g} loss={loss:.3f}", refresh=False)
            bar.update(1)

        with prints_to_log():
            test = run_range_test(run, rates, show)
    if is_main:
        plot.parent.mkdir(parents=True, exist_ok=True)
        write_synced(plot, draw(test, f"{recipe.name}: learning rate range test"))
        if options.json_path != "-":
            print("\n".join(sentences(test, options, recipe, plot)))
        write_json(result_of(test, recipe, plot), options.json_path)
    disconnect()
    return DONE


command = partial(run_command, main)  # moe-find-lr

if __name__ == "__main__":
    command()
