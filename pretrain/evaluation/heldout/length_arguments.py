"""The options of ``tools/evaluate.py`` for context lengths, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.core.errors import ConfigError
from pretrain.evaluation.heldout.lengths import AS_TRAINED, LengthOptions


def add_lengths(parser: argparse.ArgumentParser) -> None:
    """Add the options of context lengths."""
    group = parser.add_argument_group("context lengths")
    group.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help=(
            "loss at each context length, also beyond the training's, over the same held-out text;"
            " --max-windows counts windows of the longest"
        ),
    )
    group.add_argument(
        "--positions",
        nargs="+",
        default=[AS_TRAINED],
        metavar="KIND",
        help=(
            "with --lengths or --needle: position encodings to compute with, such as trained yarn"
            ' "{kind: yarn, factor: 2}" (default: trained)'
        ),
    )
    group.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help=(
            "with --lengths: loss by length and by position; with --needle: what is found, by"
            " length and depth"
        ),
    )


def length_options(arguments: argparse.Namespace) -> LengthOptions | None:
    """The context lengths to measure.

    Raises:
        ConfigError: for options that need --lengths or --needle.
    """
    if not arguments.lengths and arguments.needle is None:
        for option, default in (("plot", None), ("positions", [AS_TRAINED])):
            if getattr(arguments, option) != default:
                raise ConfigError(
                    f"--{option} belongs to --lengths and --needle: give one of them, with lengths"
                    " in tokens"
                )
    if arguments.plot is not None and arguments.watch is not None:
        raise ConfigError(
            "--plot draws one checkpoint, and --watch evaluates many: leave one of them out"
        )
    if not arguments.lengths:
        return None
    return LengthOptions(
        arguments.lengths,
        arguments.positions,
        arguments.data,
        arguments.split,
        arguments.max_windows,
    )
