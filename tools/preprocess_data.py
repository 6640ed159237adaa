#!/usr/bin/env python
"""Turns text into training data: tokenizer, .bin/.idx shards and manifest."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the command runs from a checkout, from any folder

from data_pipeline.build import BuildResult, build
from pretrain.config.cli import add_json_option, command_parser, write_json
from pretrain.config.errors import ConfigError, run_command
from pretrain.config.load import apply_override, read_recipe_file, validate_recipe
from pretrain.config.schema import DataConfig

EXAMPLE_RECIPE = "quickstart"
EXAMPLES = """\
  python tools/preprocess_data.py --recipe quickstart
      the data of a recipe, where the recipe looks for it
  python tools/preprocess_data.py --input "my/*.txt" --output data/my
      your own text files, one document a file, with a tokenizer trained on them
  python tools/preprocess_data.py --input "my/**/*.txt" --output data/my --tokenizer llama/tokenizer.json
      the same with an existing tokenizer
The same command again finds its data and does nothing; --fresh builds it again."""


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--recipe", metavar="NAME|PATH", help="build the data section of this recipe (default: the defaults of every field)")
    parser.add_argument("--input", nargs="+", action="extend", metavar="GLOB", help="text files or quoted patterns (** reaches into subfolders)")
    parser.add_argument("--output", metavar="FOLDER", help="folder of the data (default: the recipe's data.path)")
    parser.add_argument("--tokenizer", metavar="PATH", help="an existing tokenizer.json, instead of training one")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="entries of the tokenizer")
    parser.add_argument("--validation-share", type=float, metavar="SHARE", help="share of documents held out, between 0 and 1")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C", help="override any recipe field; may be repeated")
    parser.add_argument("--fresh", action="store_true", help="build also where the folder holds data, and replace it at the end")
    add_json_option(parser)
    return parser.parse_args()


def data_section(arguments: argparse.Namespace) -> tuple[DataConfig, Path]:
    """The data configuration that the options describe, and the folder to build it in.

    Raises:
        ConfigError: for options that do not go together, and where no folder is named.
    """
    content, origin = read_recipe_file(arguments.recipe or EXAMPLE_RECIPE)
    if not arguments.recipe:
        # The example's other sections only stand around the data section, so that it is checked as in any recipe.
        content["data"], origin = {}, "the command line"
    content["data"] = data = dict(content.get("data") or {})
    if arguments.input:
        data["source"] = {"kind": "text", "input": arguments.input}
    if arguments.tokenizer:
        data["tokenizer"] = {"kind": "file", "path": arguments.tokenizer}
    if arguments.vocab_size is not None:
        data["tokenizer"] = {"kind": "train_bpe"} | dict(data.get("tokenizer") or {}) | {"vocab_size": arguments.vocab_size}
    if arguments.validation_share is not None:
        data["validation_share"] = arguments.validation_share
    for override in arguments.overrides:
        apply_override(content, override)
    recipe = validate_recipe(content, origin)
    folder = arguments.output or (recipe.data_path if arguments.recipe else recipe.data.path)
    if folder is None:
        raise ConfigError("there is no folder to write to: name one with --output FOLDER, or a recipe with --recipe")
    return recipe.data, Path(folder)


def next_command(recipe: str | None, folder: Path) -> str:
    """The command that trains on the data."""
    content, origin = read_recipe_file(recipe or EXAMPLE_RECIPE)
    elsewhere = Path(validate_recipe(content, origin).data_path) != folder
    place = f" --set {shlex.quote(f'data.path={folder}')}" if elsewhere else ""
    start = "deepspeed --num_accelerators 2 launchers/pretrain.py --ds_config ds_configs/zero1.json"
    return f"{start} --recipe {shlex.quote(recipe or EXAMPLE_RECIPE)}{place}"


def print_table(result: BuildResult, command: str) -> None:
    manifest = result.manifest
    print(f"{'split':<12}{'documents':>12}{'tokens':>16}{'text bytes':>16}")
    for name, split in manifest.splits.items():
        print(f"{name:<12}{split.documents:>12,}{split.tokens:>16,}{split.utf8_bytes:>16,}")
    skipped = ", ".join(f"{count} {reason}" for reason, count in manifest.source.skipped.items())
    print(f"vocabulary  {manifest.tokenizer.vocab_size:,} entries, end of document is {manifest.tokenizer.eod_id}")
    print(f"source      {manifest.source.kind}, {manifest.source.documents:,} documents" + (f"; skipped: {skipped}" if skipped else ""))
    print(f"folder      {result.folder} ({'reused: it was built before' if result.reused else 'built'})")
    print(f"\nnext: {command}")


def main() -> None:
    arguments = parse_arguments()
    config, folder = data_section(arguments)
    result = build(config, folder, fresh=arguments.fresh, progress=True)
    command = next_command(arguments.recipe, folder)
    summary = result.manifest.model_dump(mode="json", exclude_none=True)
    write_json(
        {"folder": str(folder), "reused": result.reused, "fingerprint": result.manifest.fingerprint, **summary, "next": command}, arguments.json_path
    )
    if arguments.json_path != "-":
        print_table(result, command)


if __name__ == "__main__":
    run_command(main)
