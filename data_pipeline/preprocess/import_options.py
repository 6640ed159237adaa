"""The options of a command that imports existing shards."""

from __future__ import annotations

import argparse

from pretrain.core.errors import ConfigError


def add_import_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of existing shards to a command."""
    ready = parser.add_argument_group("existing shards")
    ready.add_argument(
        "--import-shards",
        nargs="+",
        action="extend",
        metavar="PREFIX",
        help=(
            "make a data folder of shards of Megatron, GPT-NeoX, nanotron, nanoGPT or llm.c,"
            " instead of --input; with --validation-share all are copied, documents held out by a"
            " hash of their ids"
        ),
    )
    ready.add_argument(
        "--import-validation",
        nargs="+",
        action="extend",
        metavar="PREFIX",
        help="shards that are held out (default: nothing is)",
    )
    ready.add_argument(
        "--import-split",
        metavar="SPLIT",
        help=(
            "Megatron's --split, such as 969,30,1: the first documents of each shard are trained"
            " on, the next are held out, the rest is left out"
        ),
    )


def check_import_options(arguments: argparse.Namespace) -> None:
    """Check that the options of a command go together.

    Raises:
        ConfigError: naming those that do not.
    """
    if not arguments.import_shards:
        for name in ("import_validation", "import_split"):
            if getattr(arguments, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')} names what is held out of --import-shards PREFIX:"
                    " give both"
                )
        return
    for name in (
        "input",
        "output_prefix",
        "max_samples",
        "validation_documents",
        "append_eod",
        "parse_special_tokens",
        "engine",
        "split_by",
        "max_shard_bytes",
        "on_bad",
        "max_bad_share",
    ):
        if getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} does not go with --import-shards, whose tokens and document ends are"
                " taken as they are: leave it out"
            )
