#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Checks muP on a recipe: does the size of activations depend on the width after a few steps?

Standard initialization and muP are measured side by side.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

from pretrain.analysis.coordinates import (
    KINDS,
    GrowthSummary,
    Kind,
    batches_of,
    measure,
    recipe_at,
    summary,
)
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_recipe
from pretrain.core.cli import add_json_option, add_recipe_options, command_parser, write_json
from pretrain.core.errors import ConfigError, run_command
from pretrain.core.figures import save_figure

EXAMPLES = """\
  python tools/coordinate_check.py --recipe quickstart --growing head_dim --plot coordinates.png
  python tools/coordinate_check.py --recipe debug --widths 32 64 128 --tokens random --json -
  python tools/coordinate_check.py --recipe quickstart --widths 128 256 --growing head_dim \\
      --set train.global_batch_size=4

All other widths of the model grow in proportion to hidden_size. A kind of layer is stable if its
size grows with the width to a power of at most a quarter, up or down. Attention scores, router
logits and logits are random sums first, which muP makes smaller in wider models, by a power of -0.5
("smaller start"); with more steps what is learned outweighs that. Memory is that of the widest
model with its optimizer, in fp32.

exit codes: 0 measured, 2 a recipe or widths that do not fit, 3 data that are missing or damaged,
5 a result that cannot be written"""


@dataclass(frozen=True)
class CoordinateCheck:
    """The command's result.

    Attributes:
        tokens: ``data`` or ``random``.
        widths: hidden sizes, rising.
        kinds: the growth with standard initialization and with muP.
    """

    recipe: str
    base_width: int
    growing: str
    tokens: str
    steps: int
    widths: list[int]
    kinds: dict[Kind, GrowthSummary]

    def to_dict(self) -> dict[str, object]:
        """The result as JSON has it, with each kind at the top level."""
        fields = {name: value for name, value in vars(self).items() if name != "kinds"}
        return fields | dict(self.kinds)


def parse_arguments() -> argparse.Namespace:
    """The command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    add_recipe_options(parser)
    parser.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=[64, 128, 256, 512],
        metavar="D",
        help="hidden sizes (default: 64 128 256 512)",
    )
    parser.add_argument(
        "--base-width",
        type=int,
        metavar="D",
        help="muP's base (default: that of the recipe, or else the smallest width)",
    )
    parser.add_argument(
        "--growing",
        choices=("heads", "head_dim"),
        default="heads",
        help="what attention grows by: more heads, or larger ones",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=6,
        metavar="N",
        help="optimizer steps at the recipe's peak learning rates",
    )
    parser.add_argument(
        "--tokens",
        choices=("auto", "data", "random"),
        default="auto",
        help="the recipe's data, or random ones (default: as there are)",
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the sizes of both kinds")
    add_json_option(parser)
    return parser.parse_args()


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises :class:`ConfigError` for options that measure nothing, and for an existing plot."""
    if len(set(arguments.widths)) < 2 or min(arguments.widths) < 1:
        raise ConfigError(
            f"--widths {' '.join(map(str, arguments.widths))} say nothing about growth: give two or"
            " more"
        )
    if arguments.steps < 1:
        raise ConfigError(f"--steps is {arguments.steps}: give 1 or more")
    if arguments.plot is not None and arguments.plot.exists():
        raise ConfigError(
            f"{arguments.plot} is there already: choose another --plot path, or remove it"
        )


def base_width(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """The hidden size that muP scales from."""
    base = recipe.model.initialization.base_widths
    return arguments.base_width or (min(arguments.widths) if base is None else base.hidden_size)


def print_table(result: CoordinateCheck) -> None:
    """Prints a table for each kind of initialization, with a row for each kind of layer."""
    console = Console()
    for kind in KINDS:
        powers = [Column(name, no_wrap=True) for name in ("first", "last", "change")]
        sizes = f"sizes at {', '.join(map(str, result.widths))}"
        title = f"{kind}: growth with the width to the power of"
        table = Table(
            Column("layer", no_wrap=True),
            *powers,
            sizes,
            Column("verdict", no_wrap=True),
            title=title,
        )
        for name, layer in result.kinds[kind]["layers"].items():
            change = "" if layer["change_slope"] is None else f"{layer['change_slope']:+.2f}"
            shown = ", ".join(f"{size:.3g}" for size in layer["sizes"][-1])
            table.add_row(
                name,
                f"{layer['slopes'][0]:+.2f}",
                f"{layer['slopes'][-1]:+.2f}",
                change,
                shown,
                layer["verdict"],
            )
        console.print(table)
    console.print(
        f"base width {result.base_width}, {result.steps} steps, tokens: {result.tokens}."
        " 'first' and 'last': the size before the first and after the last step, 'change': the"
        " difference between both; sizes are those after the last step."
    )


def plot(result: CoordinateCheck, path: Path) -> None:
    """Plots the size of each kind of layer against the width, with a line for each step.

    Raises:
        StorageError: if the plot cannot be written.
    """
    import matplotlib

    # Draws into memory: the default backend may ask for a display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = list(result.kinds["mup"]["layers"])
    figure, axes = pyplot.subplots(
        2,
        len(layers),
        figsize=(2.6 * len(layers), 6.5),
        sharex=True,
        sharey="col",
        layout="constrained",
        squeeze=False,
    )
    colours = pyplot.get_cmap("viridis")
    for row, kind in zip(axes, KINDS, strict=True):
        for panel, name in zip(row, layers, strict=True):
            measured = result.kinds[kind]["layers"][name]
            for step, sizes in enumerate(measured["sizes"]):
                panel.plot(
                    result.widths,
                    sizes,
                    marker="o",
                    markersize=3,
                    color=colours(0.9 * step / result.steps),
                    label=f"step {step}",
                )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_title(
                f"{kind}: {name}\n{measured['slopes'][-1]:+.2f}, {measured['verdict']}", fontsize=9
            )
        row[0].set_ylabel("root mean square")
    for panel in axes[1]:
        panel.set_xlabel("hidden_size")
    axes[0][0].legend(fontsize=7)
    save_figure(figure, path, dpi=110)


def main() -> None:
    """The command."""
    arguments = parse_arguments()
    check_arguments(arguments)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    recipe, tokens, batches = batches_of(recipe, arguments.tokens)
    base = base_width(recipe, arguments)
    widths = sorted(set(arguments.widths))
    recipes = {
        (kind, width): recipe_at(recipe, width, base, kind, arguments.growing)
        for kind in KINDS
        for width in widths
    }
    # All are checked first: the widest model may be the one that a rule refuses.
    for one in recipes.values():
        check_recipe(one)
    models = tqdm(recipes.items(), desc="measuring", unit="model")
    measured = [measure(one, kind, batches, arguments.steps) for (kind, _), one in models]
    result = CoordinateCheck(
        recipe=recipe.name,
        base_width=base,
        growing=arguments.growing,
        tokens=tokens,
        steps=arguments.steps,
        widths=widths,
        kinds={kind: summary([one for one in measured if one.kind == kind]) for kind in KINDS},
    )
    if arguments.json_path != "-":
        print_table(result)
    if arguments.plot is not None:
        plot(result, arguments.plot)
    write_json(result.to_dict(), arguments.json_path)


command = partial(run_command, main)  # moe-coordinate-check

if __name__ == "__main__":
    command()
