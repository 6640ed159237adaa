"""The options by which a command says what it scores models on."""

from __future__ import annotations

import argparse

from data_pipeline.shards.split import SPLITS
from pretrain.core.errors import ConfigError
from pretrain.evaluation.device import choose_device
from pretrain.merging.publish import Scoring


def add_scoring_options(parser: argparse.ArgumentParser, optional: bool = True) -> None:
    """``optional`` adds --no-score."""
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="shards of the checkpoint's tokenizer; those it was trained on by default",
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="validation",
        help="what the loss before and after is measured on (default: validation)",
    )
    parser.add_argument(
        "--max-windows",
        type=int,
        default=64,
        metavar="N",
        help="windows of it, spread evenly (default: 64)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    if optional:
        parser.add_argument(
            "--no-score", action="store_true", help="measure no loss: needs no data"
        )


def scoring_of(arguments: argparse.Namespace) -> Scoring | None:
    """None with --no-score.

    Raises:
        ConfigError: for a number of windows or a device that cannot be.
    """
    if arguments.max_windows < 1:
        raise ConfigError(f"--max-windows is {arguments.max_windows}: give 1 or more")
    if getattr(arguments, "no_score", False):
        return None
    return Scoring(
        arguments.data, arguments.split, arguments.max_windows, choose_device(arguments.device)
    )
