#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Merges checkpoints: averages, soups, mixtures of dense models, fewer experts, joined shards."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from rich.console import Console
from rich.table import Table

from pretrain.core.cli import add_json_option, add_set_option, command_parser, write_json
from pretrain.core.errors import run_command
from pretrain.merging import commands
from pretrain.merging.options import add_scoring_options, scoring_of

EXAMPLES = """\
  python tools/merge_checkpoints.py average --run runs/quickstart --last 5 --output averaged
  python tools/merge_checkpoints.py soup --weights 0.7 0.3 --output soup \\
      --checkpoints runs/a/checkpoints/latest runs/b/checkpoints/latest
  python tools/merge_checkpoints.py ema --run runs/quickstart --decay 0.8 --output ema
  python tools/merge_checkpoints.py shards --checkpoint runs/quickstart/checkpoints/latest \\
      --max-shard-size 2GB --output joined
  python tools/merge_checkpoints.py experts --top-k 2 --output mixed \\
      --checkpoints runs/math/checkpoints runs/code/checkpoints
  python tools/merge_checkpoints.py prune --checkpoint runs/quickstart/checkpoints/latest \\
      --keep 6 --output pruned
  python tools/merge_checkpoints.py fold --checkpoint runs/quickstart/checkpoints/latest \\
      --keep 4 --similarity outputs --output folded
All jobs but 'shards' write a checkpoint of weights: evaluate, generate, convert, or train on with
  python launchers/pretrain.py --recipe OUTPUT/recipe.yaml --set initial_weights=OUTPUT
exit codes: 0 done, 2 usage, 3 data, 4 checkpoint, 5 disk full"""
SET_HELP = "any field of the new recipe, such as model.moe.kind; may be repeated"


class JobParsers:
    """The parsers of the jobs, with the options that several jobs share."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")

    def of_many(self, name: str, explanation: str) -> argparse.ArgumentParser:
        """A job on several checkpoints."""
        parser = self.jobs.add_parser(name, help=explanation, description=explanation)
        parser.add_argument(
            "--checkpoints",
            nargs="+",
            metavar="PATH",
            help="step_N folders, folders of weights, or files 'latest', in order",
        )
        return self._finished(parser, scored=True)

    def of_one(
        self, name: str, explanation: str, scored: bool | None = None
    ) -> argparse.ArgumentParser:
        """A job on one checkpoint, that measures losses always (None) or never (False)."""
        parser = self.jobs.add_parser(name, help=explanation, description=explanation)
        parser.add_argument(
            "--checkpoint",
            required=True,
            metavar="PATH",
            help="a step_N folder, a folder of weights, or the file 'latest'",
        )
        return self._finished(parser, scored)

    def _finished(
        self, parser: argparse.ArgumentParser, scored: bool | None
    ) -> argparse.ArgumentParser:
        parser.add_argument(
            "--output",
            required=True,
            type=Path,
            metavar="FOLDER",
            help="must not exist, or be empty",
        )
        if scored is not False:
            add_scoring_options(parser, optional=scored is True)
        add_json_option(parser)
        return parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's options; each job has a parser."""
    parser = command_parser(f"{__doc__} Prints the held-out loss before and after.", EXAMPLES)
    jobs = JobParsers(parser)
    _add_averages(jobs)
    shards = jobs.of_one(
        "shards",
        "all weights, the experts of all ranks joined, as one safetensors file or as shards by"
        " size",
        scored=False,
    )
    shards.add_argument("--max-shard-size", metavar="SIZE", help="such as 5GB; one file by default")
    shards.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    _add_mixture(jobs)
    _add_reductions(jobs)
    return parser.parse_args(arguments)


def _add_averages(jobs: JobParsers) -> None:
    average = jobs.of_many(
        "average", "the uniform mean of checkpoints of one run, or of given ones"
    )
    average.add_argument(
        "--run", type=Path, metavar="FOLDER", help="a run's folder, instead of --checkpoints"
    )
    average.add_argument(
        "--last", type=int, metavar="K", help="the run's K newest checkpoints (default: all)"
    )
    soup = jobs.of_many("soup", "a mean with given weights")
    soup.add_argument(
        "--weights",
        nargs="+",
        type=float,
        required=True,
        metavar="W",
        help="one for each checkpoint; divided by their sum",
    )
    ema = jobs.of_many(
        "ema", "an exponential moving average over a run's checkpoints, oldest first"
    )
    ema.add_argument(
        "--run", type=Path, metavar="FOLDER", help="a run's folder, instead of --checkpoints"
    )
    ema.add_argument(
        "--decay", type=float, required=True, help="mean = decay * mean + (1 - decay) * next"
    )


def _add_mixture(jobs: JobParsers) -> None:
    experts = jobs.of_many(
        "experts",
        "branch-train-mix: the feed-forwards of dense models become experts, everything else is"
        " averaged",
    )
    experts.add_argument("--top-k", type=int, default=2, metavar="K", help="(default: 2)")
    experts.add_argument(
        "--router-std",
        type=float,
        metavar="STD",
        help="of the new routers (default: the recipe's initializer_range)",
    )
    experts.add_argument("--seed", type=int, default=0, help="of the new routers (default: 0)")
    add_set_option(experts, SET_HELP)


def _add_reductions(jobs: JobParsers) -> None:
    prune = jobs.of_one(
        "prune", "leaves out the experts of each layer that held-out text uses least"
    )
    fold = jobs.of_one("fold", "makes one of the experts of each layer that are most alike")
    fold.add_argument(
        "--similarity",
        choices=("weights", "outputs"),
        default="outputs",
        help="cosines of what (default: outputs)",
    )
    for parser in (prune, fold):
        parser.add_argument(
            "--keep",
            type=int,
            required=True,
            metavar="N",
            help="experts that each layer has afterwards",
        )
        add_set_option(parser, SET_HELP)


def merge(options: argparse.Namespace) -> commands.MergeResult:
    """Runs the job that was asked for."""
    if options.job == "shards":
        return commands.shards(
            options.checkpoint, options.output, options.dtype, options.max_shard_size
        )
    scoring = scoring_of(options)
    if options.job in ("prune", "fold"):
        assert scoring is not None
        similarity = options.similarity if options.job == "fold" else None
        return commands.reduce_experts(
            options.checkpoint, options.output, options.keep, similarity, options.overrides, scoring
        )
    run = getattr(options, "run", None)
    last = getattr(options, "last", None)
    folders = commands.chosen_checkpoints(options.checkpoints, run, last)
    if options.job == "experts":
        return commands.mix(
            folders,
            options.output,
            options.top_k,
            options.router_std,
            options.seed,
            options.overrides,
            scoring,
        )
    rates = commands.rates_of(
        len(folders), getattr(options, "weights", None), getattr(options, "decay", None)
    )
    return commands.blend(folders, options.output, f"-{options.job}", rates, scoring)


def show(result: commands.MergeResult) -> None:
    """Prints the losses before and after, the experts that were joined, and the notes."""
    # Paths are long: only the width of a terminal may cut them.
    console = Console(width=None if sys.stdout.isatty() else 180)
    if "losses_before" in result:
        table = Table("checkpoint", "held-out loss, nats a token")
        for path, loss in result["losses_before"].items():
            table.add_row(path, f"{loss:.6f}")
        table.add_row(f"result: {result['output']}", f"{result['loss_after']:.6f}")
        console.print(table)
    for layer in result.get("layers", []):
        clusters = " ".join("+".join(map(str, cluster)) for cluster in layer["experts"])
        used = " ".join(f"{share:.3f}" for share in layer["usage"])
        print(
            f"layer {layer['layer']}: experts {clusters} of {len(layer['usage'])}; shares of the"
            f" choices {used}"
        )
    for note in result.get("notes", []):
        print(f"note: {note}")
    print(
        f"wrote {result['tensors']} tensors in {result['bytes'] / 1e6:.1f} MB to {result['output']}"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = parse_arguments(arguments)
    result = merge(options)
    if options.json_path != "-":
        show(result)
    write_json(result, options.json_path)


command = partial(run_command, main)  # moe-merge

if __name__ == "__main__":
    command()
