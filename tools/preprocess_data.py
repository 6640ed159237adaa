#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Convert any text to training data: tokenizer, .bin/.idx shards and manifest.

After an interruption, the same command continues from its finished parts.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from data_pipeline.preprocess.coordinator import BuildResult, build
from data_pipeline.preprocess.import_options import add_import_options, check_import_options
from data_pipeline.preprocess.import_shards import ImportResult, import_shards
from data_pipeline.preprocess.pool import Pool, mpi_pool, mpi_size
from data_pipeline.preprocess.result_table import print_result
from data_pipeline.preprocess.workspace import Output
from data_pipeline.sources.guess import limit_rows, sources_of
from pretrain.config.epochs import pack_if_planned
from pretrain.config.load import (
    apply_override,
    import_plugins,
    read_recipe_file,
    validate_recipe,
)
from pretrain.config.next_command import next_command
from pretrain.config.recipe import Recipe
from pretrain.core.cli import (
    add_json_option,
    add_recipe_option,
    add_set_option,
    command_parser,
    write_json,
)
from pretrain.core.errors import ConfigError, run_command
from pretrain.core.files import JsonObject

EXAMPLE_RECIPE = "quickstart"
EXAMPLES = """\
  python tools/preprocess_data.py --recipe quickstart
      the data of a recipe, at the place where the recipe looks for it
  python tools/preprocess_data.py --input "my/*.txt" --output data/my
      your own text files, one document a file, with a tokenizer trained on them
  python tools/preprocess_data.py --input "corpus/*.jsonl.zst" --text-field text \\
      --tokenizer tokenizer.json --output-prefix data/corpus --workers 2 --append-eod
      Megatron's form: data/corpus.bin and .idx, one document a record, nothing held out
  python tools/preprocess_data.py --input chats.jsonl --tokenizer spm.model --output data/chats \
      --parse-special-tokens
      texts in which special tokens are spelled out, such as <|im_start|>
  python tools/preprocess_data.py --input "web/*.parquet" ~/src/project --output data/mix
      several kinds at once; the kind of a folder is that of its files
  python tools/preprocess_data.py --input my/hub_clone --output data/clone
      the train split of a clone or download from the hub; --dataset-config and
      --dataset-split choose others
  zstdcat dump.jsonl.zst | python tools/preprocess_data.py --input - --output data/dump
  python tools/preprocess_data.py --import-shards old/part_*.bin --tokenizer tokenizer.json \\
      --output data/old
      existing shards: Megatron's and GPT-NeoX's .bin/.idx, nanotron's .ds, nanoGPT's and
      llm.c's .bin; linked instead of copied if possible
  mpirun -n 64 python tools/preprocess_data.py --recipe big
      over the nodes of a cluster; rank 0 hands out the work, the folder is on storage that all
      nodes share
The same command again finds finished data and does nothing; --fresh builds it again."""
# Options that are fields of a source's section, and the kinds of source that have them.
SOURCE_OPTIONS = {
    "text_field": ("jsonl", "parquet", "arrow", "csv", "datasets", "stdin"),
    "id_field": ("jsonl", "parquet", "arrow", "csv", "datasets", "stdin"),
    "encoding": ("jsonl", "csv", "text", "stdin"),
    "quoting": ("csv",),
}
OF_DATA = (
    "validation_share",
    "validation_documents",
    "split_by",
    "max_shard_bytes",
    "on_bad",
    "max_bad_share",
)
OF_INPUT = ("format", "dataset_config", "dataset_split", *SOURCE_OPTIONS)


def parse_arguments() -> argparse.Namespace:
    """Return the command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    add_recipe_option(
        parser, help="build the data section of this recipe (default: the defaults of every field)"
    )
    _add_input_options(parser)
    add_import_options(parser)
    _add_tokenizer_options(parser)
    _add_output_options(parser)
    add_set_option(parser)
    add_json_option(parser)
    return parser.parse_args()


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("input")
    source.add_argument(
        "--input",
        nargs="+",
        action="extend",
        metavar="GLOB",
        help="files, quoted patterns (** reaches into subfolders), folders, -",
    )
    source.add_argument(
        "--format",
        choices=["text", "line", "jsonl", "parquet", "arrow", "csv", "source_code", "datasets"],
        help=(
            "of --input (default: by the files' names); datasets reads names of the Hugging Face"
            " hub too"
        ),
    )
    source.add_argument(
        "--dataset-config", metavar="NAME", help="config of a folder or data set that has several"
    )
    source.add_argument(
        "--dataset-split",
        metavar="NAME",
        help="split of a folder or data set (default: train; all reads every file)",
    )
    source.add_argument(
        "--text-field",
        "--json-key",
        metavar="NAME",
        help="field of a record with the text, a.b for b inside a (default: text)",
    )
    source.add_argument("--id-field", metavar="NAME", help="field that names a document for ever")
    source.add_argument(
        "--max-samples",
        type=int,
        metavar="N",
        help="rows that are read of each data set, from its start; -1: all (default)",
    )
    source.add_argument(
        "--on-bad",
        choices=["skip", "fail"],
        help="what a bad record does (default: skip; each is listed in bad_records.jsonl)",
    )
    source.add_argument(
        "--max-bad-share",
        type=float,
        metavar="SHARE",
        help="a larger share of a source's records or bytes lost stops the build (default: 0.05)",
    )
    source.add_argument(
        "--encoding",
        metavar="NAME",
        help="of text, JSON and CSV (default: utf-8, or what a byte order mark says)",
    )
    source.add_argument(
        "--quoting",
        action=argparse.BooleanOptionalAction,
        help='CSV: "..." may hold delimiters and line ends (default: yes, but not between tabs)',
    )


def _add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="an existing tokenizer.json, SentencePiece .model, or Mistral's file by name",
    )
    tokenizer.add_argument("--vocab-size", type=int, metavar="N", help="entries of the tokenizer")
    tokenizer.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        help=(
            "end each document with the end-of-document token (default: yes; with"
            " --output-prefix: no)"
        ),
    )
    tokenizer.add_argument(
        "--engine",
        choices=["fastokens", "gigatoken", "tiktoken", "sentencepiece", "tokenizers"],
        help="library that encodes (default: the fastest with equal ids)",
    )
    tokenizer.add_argument(
        "--parse-special-tokens",
        action="store_true",
        default=None,
        help="special tokens that a text spells out become their ids (default: ordinary text)",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", metavar="FOLDER", help="folder of the data (default: the recipe's data.path)"
    )
    output.add_argument(
        "--output-prefix",
        metavar="PREFIX",
        help="write PREFIX.bin, .idx and manifest instead, one shard, nothing held out",
    )
    held_out = output.add_mutually_exclusive_group()
    held_out.add_argument(
        "--validation-share",
        type=float,
        metavar="SHARE",
        help="share of documents held out, from 0 to below 1",
    )
    held_out.add_argument(
        "--validation-documents",
        type=int,
        metavar="N",
        help="hold out exactly N documents instead of a share of them",
    )
    output.add_argument(
        "--split-by",
        choices=["content", "path", "id"],
        help="what decides whether a document is held out: its text (default), file or --id-field",
    )
    output.add_argument("--max-shard-bytes", type=int, metavar="BYTES", help="of one .bin")
    output.add_argument("--workers", type=int, metavar="N", help="processes (default: every core)")
    output.add_argument(
        "--fresh",
        action="store_true",
        help="build even if there is data, and replace it at the end",
    )


def data_section(arguments: argparse.Namespace) -> tuple[Recipe, Output]:
    """Return the recipe with the data section that the options describe, and the output's place.

    Raises:
        ConfigError: for options that do not go together, and if no folder is named.
    """
    content, origin = read_recipe_file(arguments.recipe or EXAMPLE_RECIPE)
    if not arguments.recipe:
        # Only a complete recipe can be validated: the example gives the other sections.
        content["data"], origin = {}, "the command line"
    content["data"] = data = dict(content.get("data") or {})
    if arguments.output_prefix:
        data |= {"validation_share": 0.0, "validation_documents": None, "max_shard_bytes": None}
    check_import_options(arguments)
    if arguments.import_shards:
        data |= {"validation_share": 0.0, "validation_documents": None}
    elif arguments.validation_share is not None:
        data["validation_documents"] = None
    if arguments.input:
        _set_sources(data, arguments)
    elif unused := [name for name in OF_INPUT if getattr(arguments, name) is not None]:
        raise ConfigError(
            f"--{unused[0].replace('_', '-')} says how to read --input: give that too, or set the"
            " field of the recipe's source with --set"
        )
    _set_tokenizer(data, arguments)
    if arguments.max_samples is not None:
        limit_rows(data, arguments.max_samples)
    for name in OF_DATA:
        if getattr(arguments, name) is not None:
            data[name] = getattr(arguments, name)
    for override in arguments.overrides:
        apply_override(content, override)
    import_plugins(content)
    recipe = validate_recipe(content, origin)
    return recipe, _output(arguments, recipe.data_path if arguments.recipe else recipe.data.path)


def _set_sources(data: JsonObject, arguments: argparse.Namespace) -> None:
    sources = sources_of(
        arguments.input, arguments.format, arguments.dataset_config, arguments.dataset_split
    )
    for name, kinds in SOURCE_OPTIONS.items():
        value = getattr(arguments, name)
        sections = [section for section in sources.values() if section["kind"] in kinds]
        if value is None:
            continue
        if not sections:
            option = f"--{name.replace('_', '-')}"
            kinds_read = ", ".join(sorted({section["kind"] for section in sources.values()}))
            raise ConfigError(
                f"{option} is for {', '.join(kinds)}, and --input is read as {kinds_read}: leave it"
                " out, or say what it is with --format"
            )
        for section in sections:
            section[name] = value
    data.pop("source", None)
    data.pop("sources", None)
    data |= {"source": next(iter(sources.values()))} if len(sources) == 1 else {"sources": sources}


def _set_tokenizer(data: JsonObject, arguments: argparse.Namespace) -> None:
    section = dict(data.get("tokenizer") or {})
    path = arguments.tokenizer
    if path and path.endswith(".model"):
        section = {"kind": "sentencepiece", "path": path}
    elif path and not os.path.exists(path) and (path.startswith("tekken") or ".model.v" in path):
        section = {"kind": "mistral", "name": path}
    elif path:
        section = {"kind": "file", "path": path}
    if arguments.vocab_size is not None:
        section = {"kind": "train_bpe"} | section | {"vocab_size": arguments.vocab_size}
    append_eod = (
        False if arguments.append_eod is None and arguments.output_prefix else arguments.append_eod
    )
    if append_eod is not None:
        section = {"kind": "train_bpe"} | section | {"append_eod": append_eod}
    if arguments.parse_special_tokens:
        section = {"kind": "train_bpe"} | section | {"parse_special_tokens": True}
    if section:
        data["tokenizer"] = section


def _output(arguments: argparse.Namespace, data_path: str | None) -> Output:
    if arguments.output_prefix:
        if arguments.output:
            raise ConfigError("--output and --output-prefix name two places: give one of them")
        prefix = Path(arguments.output_prefix)
        if prefix.is_dir() or not prefix.name:
            raise ConfigError(
                f"--output-prefix {prefix} is a folder: add the beginning of the files' names, such"
                f" as {prefix / 'corpus'}"
            )
        return Output(prefix.parent, prefix.name)
    folder = arguments.output or data_path
    if folder is None:
        raise ConfigError(
            "there is no folder to write to: name one with --output FOLDER, or a recipe with"
            " --recipe"
        )
    return Output(Path(folder))


def show_warnings() -> None:
    """Send the pipeline's warnings to standard error, since there is no log file."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    logging.getLogger("data_pipeline").addHandler(handler)


def run(pool: Pool | None) -> None:
    """Run the command; under mpirun with a pool of the other ranks."""
    arguments = parse_arguments()
    show_warnings()
    recipe, output = data_section(arguments)
    started = time.perf_counter()
    result: BuildResult
    if arguments.import_shards:
        held_out = arguments.import_validation or []
        result = import_shards(
            arguments.import_shards,
            held_out,
            recipe.data,
            output,
            arguments.fresh,
            True,
            arguments.workers,
            arguments.import_split,
        )
    else:
        result = build(
            recipe.data, output, arguments.fresh, True, arguments.workers, pool, arguments.engine
        )
    seconds = time.perf_counter() - started
    packing = pack_if_planned(recipe, output.path)
    command = next_command(
        arguments.recipe or EXAMPLE_RECIPE, arguments.overrides, recipe, output.path
    )
    summary = result.manifest.model_dump(mode="json", exclude_none=True)
    facts: JsonObject = {
        "folder": str(output.path),
        "reused": result.reused,
        "engine": result.engine,
        "seconds": seconds,
        "packing": packing,
        "fingerprint": result.manifest.fingerprint,
    }
    if isinstance(result, ImportResult):
        facts |= {"imported": result.how, "largest_id": result.largest_id, "notes": result.notes}
        for note in result.notes:
            print(f"warning: {note}", file=sys.stderr)
    write_json({**facts, **summary, "next": command}, arguments.json_path)
    if arguments.json_path != "-":
        print_result(result, packing, seconds, command)


def main() -> None:
    """Run the command on this machine, or over the ranks of an MPI job."""
    if mpi_size(os.environ) == 1:
        run(None)
        return
    with mpi_pool() as pool:
        if pool is not None:
            run(pool)


command = partial(run_command, main)  # moe-preprocess

if __name__ == "__main__":
    command()
