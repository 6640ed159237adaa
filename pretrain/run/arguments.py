"""The command line of the trainer."""

from __future__ import annotations

import argparse

from pretrain.core.cli import add_json_option, add_recipe_options, command_parser
from pretrain.core.shipped import DEFAULT_DS_CONFIG
from pretrain.run.estimate import add_estimate_options

EXAMPLES = """\
  deepspeed --num_accelerators 2 launchers/pretrain.py \\
    --ds_config ds_configs/zero1.json --recipe quickstart
  torchrun --nproc_per_node 8 launchers/pretrain.py \\
    --ds_config ds_configs/zero3.json --recipe moe_1b --set parallel.ep_size=8
  python launchers/pretrain.py --recipe debug --dry-run"""


def add_launcher_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that a launcher starts."""
    parser.add_argument(
        "--ds_config",
        "--ds-config",
        default=DEFAULT_DS_CONFIG,
        metavar="NAME|PATH",
        help="DeepSpeed's JSON: a file in ds_configs/ without .json, or a path (default: zero1)",
    )
    # The deepspeed launcher passes it. It is not read: LOCAL_RANK in the environment is the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the trainer's options, from ``sys.argv`` by default."""
    parser = command_parser(
        "Pretrains a model from a recipe. The same command again resumes; a finished run says so.",
        EXAMPLES,
    )
    add_recipe_options(parser)
    add_launcher_options(parser)
    parser.add_argument(
        "--fresh", action="store_true", help="start over; refuses if the folder holds a run"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="with --fresh: delete the run that is there"
    )
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="compare the gradients of one small batch with those of a single rank first",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, sizes, memory and time, and stop",
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="with --dry-run: plan for N ranks"
    )
    add_estimate_options(parser)
    add_json_option(parser)
    return parser.parse_args(arguments)
