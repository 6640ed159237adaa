#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Writes a synthetic corpus for long contexts: texts of two lengths, and their tokenizer.

Keys have values that only the text around them says. tools/evaluate.py --needle --needle-form pairs
asks for them.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from tqdm import tqdm

from pretrain.core.cli import add_json_option, command_parser, write_json
from pretrain.core.errors import ConfigError, StorageError, run_command
from pretrain.core.files import JsonObject, make_durable_folder, write_synced
from pretrain.evaluation.needle.corpus import Documents, documents, tokenizer_json
from pretrain.evaluation.needle.forms import PAIR_KEYS

SETTINGS = "corpus.json"  # written last: a folder with it is complete
EXAMPLES = """\
  python tools/make_needle_corpus.py --output data/long_context_texts
  python tools/make_needle_corpus.py --output data/longer_texts --long-tokens 4096 --overwrite
then  python tools/preprocess_data.py --recipe long_context
exit codes: 0 done, or nothing to do; 2 usage; 5 disk full"""


def parse_arguments() -> argparse.Namespace:
    """Return the command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="gets short.jsonl, long.jsonl, tokenizer.json and corpus.json",
    )
    for name, tokens, count in (("short", 256, 20_000), ("long", 2048, 1_000)):
        parser.add_argument(
            f"--{name}-tokens", type=int, default=tokens, metavar="N", help=f"(default: {tokens})"
        )
        parser.add_argument(
            f"--{name}-documents", type=int, default=count, metavar="N", help=f"(default: {count})"
        )
    parser.add_argument(
        "--pair-share", type=float, default=0.8, help="of the words, in pairs (default: 0.8)"
    )
    parser.add_argument(
        "--max-keys", type=int, default=16, metavar="N", help="of a short document (default: 16)"
    )
    parser.add_argument(
        "--long-max-keys", type=int, default=64, metavar="N", help="of a long one (default: 64)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a corpus of other settings"
    )
    add_json_option(parser)
    return parser.parse_args()


def settings_of(arguments: argparse.Namespace) -> JsonObject:
    """What the texts depend on.

    Raises:
        ConfigError: for a number that gives no corpus.
    """
    sizes = ("short_tokens", "short_documents", "long_tokens", "long_documents")
    names = (*sizes, "max_keys", "long_max_keys")
    settings = {name: getattr(arguments, name) for name in names}
    if wrong := [name for name in names if settings[name] < (3 if name.endswith("tokens") else 1)]:
        raise ConfigError(
            f"--{wrong[0].replace('_', '-')} is {settings[wrong[0]]}: give 1 or more, and 3 tokens"
            " or more"
        )
    for name in ("max_keys", "long_max_keys"):
        if settings[name] >= len(PAIR_KEYS):
            raise ConfigError(
                f"--{name.replace('_', '-')} is {settings[name]}: there are {len(PAIR_KEYS)} keys,"
                " and needles need some of them; give fewer"
            )
    if not 0 < arguments.pair_share <= 1:
        raise ConfigError(f"--pair-share is {arguments.pair_share}: give a share above 0, up to 1")
    return {**settings, "pair_share": arguments.pair_share, "seed": arguments.seed}


def write_corpus(folder: Path, settings: JsonObject) -> None:
    """Write all files.

    Raises:
        StorageError: if one cannot be written.
    """
    try:
        make_durable_folder(folder)
        # Texts of other settings are no corpus of these.
        (folder / SETTINGS).unlink(missing_ok=True)
        for name in ("short", "long"):
            count = settings[f"{name}_documents"]
            max_keys = settings["max_keys" if name == "short" else "long_max_keys"]
            kind = Documents(settings[f"{name}_tokens"], settings["pair_share"], max_keys)
            with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                texts = documents(kind, count, settings["seed"])
                for text in tqdm(texts, total=count, desc=f"{name} documents", unit="document"):
                    file.write(json.dumps({"text": text}) + "\n")
        write_synced(folder / "tokenizer.json", tokenizer_json().encode())
        write_synced(folder / SETTINGS, json.dumps(settings, indent=2).encode())
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or folder}: {error.strerror}; choose another --output"
        ) from None


def main() -> None:
    """Run the command."""
    arguments = parse_arguments()
    settings, folder = settings_of(arguments), arguments.output
    done = folder / SETTINGS
    reused = done.is_file() and done.read_text("utf-8") == json.dumps(settings, indent=2)
    if not reused:
        if folder.exists() and not arguments.overwrite:
            raise ConfigError(
                f"--output {folder} is there already, and not with these settings: choose another"
                " folder, or replace its files with --overwrite"
            )
        write_corpus(folder, settings)
    tokens = sum(
        settings[f"{name}_tokens"] * settings[f"{name}_documents"] for name in ("short", "long")
    )
    write_json(
        {"output": str(folder), "reused": reused, "tokens": tokens, **settings},
        arguments.json_path,
    )
    if arguments.json_path != "-":
        state = "is there already" if reused else "is written"
        print(f"{folder} {state}: {tokens:,} tokens")


command = partial(run_command, main)  # moe-needle-corpus

if __name__ == "__main__":
    command()
