#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Shows a checkpoint's files, weights, topology, recipe and experts, or compares two."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from rich.console import Console
from rich.table import Table

from pretrain.checkpoint.inspect import STATE_FIELDS, compare_checkpoints, inspect_checkpoint
from pretrain.checkpoint.layout import RECIPE, resolve_checkpoint
from pretrain.core.cli import add_json_option, command_parser, write_json
from pretrain.core.errors import CheckpointError, ConfigError, run_command

EXAMPLES = """\
  python tools/inspect_checkpoint.py --checkpoint runs/quickstart/checkpoints/latest
  python tools/inspect_checkpoint.py --checkpoint runs/quickstart/checkpoints/step_300 --verify \\
      --tensors --recipe
  python tools/inspect_checkpoint.py --checkpoint runs/a/checkpoints/latest \\
      --diff runs/b/checkpoints/latest --sort cosine --json -
exit codes: 0 done, also if two checkpoints differ; 2 usage; 4 checkpoint missing, or not as it was
saved"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a step_N folder, a folder of weights, or the file 'latest'",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="hash every file; without it only sizes are compared with the manifest",
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--recipe", action="store_true", help="print the recipe")
    parser.add_argument(
        "--diff", metavar="OTHER", help="compare with another checkpoint, tensor by tensor, instead"
    )
    parser.add_argument(
        "--sort",
        choices=("absolute", "relative", "cosine"),
        default="absolute",
        help="what --diff goes by (default: absolute)",
    )
    parser.add_argument(
        "--top",
        type=int,
        default=20,
        metavar="N",
        help="rows that --diff prints; --json has all (default: 20)",
    )
    add_json_option(parser)
    return parser.parse_args(arguments)


def wide_console() -> Console:
    """A console that does not cut the long names of tensors, unless it is a narrow terminal."""
    return Console(width=None if sys.stdout.isatty() else 180)


def show_checkpoint(result: Mapping[str, Any], tensors: bool, recipe: bool) -> None:
    """Prints the result of :func:`pretrain.checkpoint.inspect.inspect_checkpoint`."""
    console = wide_console()
    table = Table("what", "value", title=result["checkpoint"])
    for name in STATE_FIELDS:
        if result[name] is not None:
            table.add_row(name.replace("_", " "), str(result[name]))
    model = result["recipe"]["model"]
    layers = (
        f"{model['num_hidden_layers']} layers of width {model['hidden_size']},"
        f" {len(result['experts'])} with experts"
    )
    table.add_row(
        "model",
        f"{result['recipe']['name']}: {result['parameters']:,} weights in {len(result['tensors'])}"
        f" tensors; {layers}",
    )
    console.print(table)
    files = Table(
        "file", "bytes", "sha256 as saved", "now", title=f"{result['bytes'] / 1e6:,.1f} MB"
    )
    for file in result["files"]:
        files.add_row(
            file["name"],
            f"{file['bytes'] or 0:,}",
            file["sha256"][:16],
            file["fault"] or "as saved",
        )
    console.print(files)
    if tensors:
        listed = Table("tensor", "shape", title="tensors, the experts of all ranks joined")
        for name, shape in result["tensors"].items():
            listed.add_row(name, str(shape))
        console.print(listed)
    if result["experts"]:
        console.print(expert_rows(result["experts"]))
    if recipe:
        console.print(
            (Path(result["checkpoint"]) / RECIPE).read_text(encoding="utf-8"),
            markup=False,
            highlight=False,
        )


def expert_rows(layers: Sequence[Mapping[str, Any]]) -> Table:
    """A table with a row for each layer with experts."""
    names = list(layers[0]["norms"])
    table = Table(
        "layer",
        "experts",
        *names,
        "router row",
        "balance bias",
        "most alike",
        "least alike",
        title="experts: norms from the least to the largest",
    )
    for layer in layers:
        spans = [_span(layer["norms"][name]) for name in names] + [_span(layer["router_norms"])]
        bias = "-" if layer["balance_bias"] is None else _span(layer["balance_bias"])
        pairs = [_pair(layer[which]) for which in ("most_alike", "least_alike")]
        table.add_row(str(layer["layer"]), str(layer["num_experts"]), *spans, bias, *pairs)
    return table


def _span(values: list[float]) -> str:
    return f"{min(values):.3g} .. {max(values):.3g}"


def _pair(pair: Mapping[str, Any] | None) -> str:
    return (
        "-" if pair is None else f"{pair['experts'][0]}, {pair['experts'][1]}: {pair['cosine']:.4f}"
    )


def show_differences(result: Mapping[str, Any], top: int) -> None:
    """Prints the result of :func:`pretrain.checkpoint.inspect.compare_checkpoints`."""
    console = wide_console()
    rows = result["tensors"]
    table = Table(
        "tensor",
        "max |a - b|",
        "relative",
        "cosine",
        title=f"{result['checkpoint']} (a) and {result['other']} (b)",
    )
    for row in rows[:top]:
        values = (
            [row["fault"], "", ""]
            if row["fault"]
            else [f"{row['absolute']:.3e}", f"{row['relative']:.3e}", f"{row['cosine']:.6f}"]
        )
        table.add_row(row["name"], *values)
    console.print(table)
    print(
        f"{result['equal']} of {len(rows)} tensors are equal bit for bit; {max(len(rows) - top, 0)}"
        " more rows are in --json"
    )
    for name, (before, after) in result["recipe"].items():
        print(f"recipe: {name} is {before} in a, {after} in b")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = parse_arguments(arguments)
    if options.top < 1:
        raise ConfigError(f"--top is {options.top}: give 1 or more")
    quiet = options.json_path == "-"
    folder = resolve_checkpoint(options.checkpoint)
    if options.diff is not None:
        compared = compare_checkpoints(folder, resolve_checkpoint(options.diff), options.sort)
        if not quiet:
            show_differences(compared, options.top)
        write_json(compared, options.json_path)
        return
    result = inspect_checkpoint(folder, options.verify)
    if not quiet:
        show_checkpoint(result, options.tensors, options.recipe)
    write_json(result, options.json_path)
    # After the report: what is damaged can be seen in it.
    if faults := [file for file in result["files"] if file["fault"]]:
        raise CheckpointError(
            f"{folder} is damaged: {faults[0]['name']} {faults[0]['fault']}; choose another"
            " checkpoint"
        )


command = partial(run_command, main)  # moe-inspect-checkpoint

if __name__ == "__main__":
    command()
