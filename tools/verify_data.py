#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Checks every byte of built data: checksums, indices, token ids, document ends, totals."""

from __future__ import annotations

import argparse
from functools import partial

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from data_pipeline.shards.inspection import check_everything
from data_pipeline.shards.manifest import load_manifest
from pretrain.core.cli import add_json_option, command_parser, write_json
from pretrain.core.errors import BAD_DATA, DONE, run_command
from pretrain.core.progress import Stage

EXAMPLES = """\
  python tools/verify_data.py data/quickstart
  python tools/verify_data.py data/corpus --json -     # shards with a common prefix"""


def parse_arguments() -> argparse.Namespace:
    """Return the command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("data", help="a data folder, or the prefix of shards")
    add_json_option(parser)
    return parser.parse_args()


def main() -> int:
    """Run the command; return the exit code."""
    arguments = parse_arguments()
    manifest = load_manifest(arguments.data)
    total = sum(split.tokens for split in manifest.splits.values())
    with Stage("verifying", True, total, "token") as stage:
        faults = check_everything(manifest, stage.advance)
    result = {
        "data": arguments.data,
        "whole": not faults,
        "faults": faults,
        "tokens": total,
        "fingerprint": manifest.fingerprint,
    }
    write_json(result, arguments.json_path)
    if arguments.json_path != "-":
        shards = sum(len(split.shards) for split in manifest.splits.values())
        print(
            "\n".join(faults)
            if faults
            else (
                f"{arguments.data} is whole: {shards} shards, {total:,} tokens, fingerprint"
                f" {manifest.fingerprint}"
            )
        )
    return BAD_DATA if faults else DONE


command = partial(run_command, main)  # moe-verify-data

if __name__ == "__main__":
    command()
