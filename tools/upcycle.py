#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Makes a mixture of experts of a dense checkpoint, whose feed-forwards become the experts.

This is sparse upcycling (Komatsuzaki et al. 2023); feed-forwards may also be split into shards.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TypedDict

from data_pipeline.tokenizer.files import tokenizer_file
from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from pretrain.checkpoint.layout import read_recipe, read_state
from pretrain.checkpoint.lazy_weights import StoredWeights
from pretrain.checkpoint.weights_only import write_weights_folder
from pretrain.config.next_command import fewest_ranks, training_command
from pretrain.config.recipe import Recipe
from pretrain.core.cli import add_json_option, add_set_option, command_parser, write_json
from pretrain.core.errors import CheckpointError, ConfigError, run_command
from pretrain.evaluation.checkpoint import whole_checkpoint
from pretrain.merging.assembly import moe_recipe
from pretrain.merging.options import add_scoring_options, scoring_of
from pretrain.merging.publish import checked_folder
from pretrain.merging.upcycle import Upcycling, check_sizes, upcycled_tensors
from pretrain.model.sizes import model_size
from pretrain.model.widths import initial_router_std

# Nats a token: the losses differ by the order of the sums in the experts only.
TOLERANCE = 1e-5
EXAMPLES = """\
  python tools/upcycle.py --checkpoint runs/dense/checkpoints/latest --output upcycled \\
      --num-experts 8 --top-k 2
  python tools/upcycle.py --checkpoint runs/dense/checkpoints/latest --output upcycled_fine \\
      --num-experts 32 --top-k 8 --granularity 4
  python tools/upcycle.py --checkpoint runs/dense/checkpoints/latest --output upcycled_drop \\
      --num-experts 8 --top-k 2 --reinit-share 0.5 \\
      --set 'model.layer_pattern={kind: every_nth, n: 2}' \\
      --set model.moe.router.kind=sigmoid_topk
then  python launchers/pretrain.py --recipe upcycled/recipe.yaml --set initial_weights=upcycled
exit codes: 0 done, 2 usage, 3 data, 4 checkpoint, 5 disk full"""


class UpcyclingResult(TypedDict):
    """The command's result as JSON.

    ``layers`` has the indices of the new mixtures. Losses are in nats a token on held-out text,
    None with ``--no-score``.
    """

    checkpoint: str
    output: str
    layers: list[int]
    parameters_before: int
    parameters_after: int
    parameters_active: int
    loss_before: float | None
    loss_after: float | None


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = command_parser(
        f"{__doc__} The mixture's loss equals the dense model's, unless the experts are varied.",
        EXAMPLES,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a dense model: a step_N folder, a folder of weights, or 'latest'",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="weights and recipe to train on from; must not exist",
    )
    parser.add_argument("--num-experts", required=True, type=int, metavar="E")
    parser.add_argument("--top-k", required=True, type=int, metavar="K")
    parser.add_argument(
        "--granularity",
        type=int,
        default=1,
        metavar="G",
        help="split each feed-forward into G shards (default: 1)",
    )
    parser.add_argument(
        "--router",
        choices=("normal", "zero"),
        default="normal",
        help="the new routers' matrices (default: normal)",
    )
    parser.add_argument(
        "--router-std",
        type=float,
        metavar="STD",
        help="standard deviation of normal routers (default: the recipe's initializer_range)",
    )
    parser.add_argument(
        "--noise-std",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="noise on the copies, as a share of each matrix' own std",
    )
    parser.add_argument(
        "--reinit-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of each expert's hidden units that is drawn anew",
    )
    parser.add_argument("--seed", type=int, default=0, help="of routers and noise (default: 0)")
    add_set_option(parser, "any field of the new recipe, such as model.layer_pattern.kind")
    add_scoring_options(parser)
    add_json_option(parser)
    return parser.parse_args(arguments)


def options_of(arguments: argparse.Namespace, dense: Recipe) -> Upcycling:
    """The options as numbers; raises :class:`ConfigError` for one that is out of range."""
    for name, low, high in (
        ("granularity", 1, None),
        ("noise_std", 0, None),
        ("reinit_share", 0, 1),
        ("router_std", 0, None),
    ):
        value = getattr(arguments, name)
        if value is not None and (value < low or (high is not None and value > high)):
            limits = f"{low} or more" if high is None else f"{low} to {high}"
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: give {limits}")
    if arguments.router == "zero" and arguments.router_std is not None:
        raise ConfigError("--router-std is for --router normal: leave one of them out")
    std = initial_router_std(dense.model) if arguments.router_std is None else arguments.router_std
    return Upcycling(
        arguments.granularity,
        0.0 if arguments.router == "zero" else std,
        arguments.noise_std,
        arguments.reinit_share,
        arguments.seed,
    )


def upcycle(arguments: argparse.Namespace) -> UpcyclingResult:
    """Writes the mixture, and checks that its loss equals the dense model's if it must.

    Raises:
        ConfigError: for sizes that do not fit each other.
        CheckpointError: if the checkpoint has no dense feed-forwards, or the loss is another one.
    """
    checkpoint = whole_checkpoint(arguments.checkpoint)
    dense = read_recipe(checkpoint)
    scoring = scoring_of(arguments)
    options = options_of(arguments, dense)
    if dense.model.intermediate_size is None:
        raise CheckpointError(f"{checkpoint} has no dense feed-forward: give a dense model")
    width = dense.model.intermediate_size // options.granularity
    moe = {
        "num_experts": arguments.num_experts,
        "top_k": arguments.top_k,
        "moe_intermediate_size": width,
    }
    recipe = moe_recipe(dense, "-upcycled", moe, arguments.overrides)
    check_sizes(dense.model, recipe.model, options)
    with checked_folder(arguments.output) as folder:
        before = scoring.loss(checkpoint) if scoring is not None else None
        tensors = upcycled_tensors(StoredWeights(checkpoint), recipe.model, options)
        write_weights_folder(
            folder, recipe, tensors, tokenizer_file(checkpoint), read_state(checkpoint)["step"]
        )
        # The folder is not published yet: checked_folder removes it if an error is raised below.
        after = scoring.loss(folder) if scoring is not None else None
        if (
            before is not None
            and after is not None
            and options.is_exact
            # Not "> TOLERANCE", which is false for NaN.
            and not abs(after - before) <= TOLERANCE
        ):
            raise CheckpointError(
                f"the mixture's loss is {after:.6f} and the dense model's {before:.6f}, which"
                " should be equal: nothing was published; a checkpoint in which the loss depends"
                " on the batch (such as one with dropped tokens) cannot be upcycled"
            )
    sizes = [model_size(each.model, each.train.sequence_length) for each in (dense, recipe)]
    return {
        "checkpoint": str(checkpoint),
        "output": str(arguments.output),
        "layers": recipe.model.routed_layers,
        "parameters_before": sizes[0].parameters_total,
        "parameters_after": sizes[1].parameters_total,
        "parameters_active": sizes[1].parameters_active,
        "loss_before": before,
        "loss_after": after,
    }


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = parse_arguments(arguments)
    result = upcycle(options)
    if options.json_path != "-":
        print(
            f"layers {', '.join(map(str, result['layers']))} are mixtures now:"
            f" {result['parameters_before']:,} parameters became {result['parameters_after']:,},"
            f" {result['parameters_active']:,} active"
        )
        if result["loss_before"] is not None:
            print(
                f"held-out loss: dense {result['loss_before']:.6f}, mixture"
                f" {result['loss_after']:.6f} nats per token"
            )
        recipe_file = options.output / "recipe.yaml"
        start = training_command(
            recipe_file,
            [f"initial_weights={options.output}"],
            ranks=fewest_ranks(read_recipe(options.output), at_least=1),
        )
        print(f"train on: {start}")
    write_json(result, options.json_path)


command = partial(run_command, main)  # moe-upcycle

if __name__ == "__main__":
    command()
