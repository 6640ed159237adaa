#!/usr/bin/env python
"""Converts a checkpoint: to a folder that Hugging Face transformers opens, or to plain safetensors with all experts joined."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the command runs from a checkout, from any folder

from pretrain.config.cli import add_json_option, command_parser, write_json
from pretrain.config.errors import run_command
from pretrain.evaluation.checkpoint import load_matching_corpora, whole_checkpoint
from pretrain.export.convert import Conversion, export_hf, export_safetensors
from pretrain.export.parity import TOLERANCE

EXAMPLES = """\
  python tools/convert_checkpoint.py --checkpoint runs/quickstart/checkpoints/latest --to hf --output exports/quickstart
  python tools/convert_checkpoint.py --checkpoint runs/quickstart/checkpoints/step_300 --to safetensors --dtype bfloat16 --output exports/plain"""


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a step_N folder, or the file 'latest' that names one")
    parser.add_argument("--to", choices=("hf", "safetensors"), required=True, help="hf: compared with the checkpoint before it is published")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the written weights (default: float32)")
    parser.add_argument("--data", metavar="FOLDER", help="shards whose held-out text is compared (--to hf); the run's own by default")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --output")
    add_json_option(parser)
    return parser.parse_args()


def summary(conversion: Conversion, output: Path) -> str:
    lines = [f"wrote {conversion.tensors} tensors, {conversion.bytes / 1e6:.1f} MB of {conversion.dtype}, as {conversion.target} to {output}"]
    if conversion.left_out:
        lines.append(f"left out {len(conversion.left_out)} tensors of multi-token prediction, which {conversion.target} has no place for")
    if conversion.parity is not None:
        parity = conversion.parity
        lines.append(
            f"logits over {parity.windows} windows: max |difference| {parity.max_difference:.2e} (allowed {TOLERANCE:.0e}), "
            f"standard deviation of the logits {parity.logits_std:.2e}"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    checkpoint, dtype = whole_checkpoint(arguments.checkpoint), getattr(torch, arguments.dtype)
    if arguments.to == "hf":
        corpora = load_matching_corpora(arguments.data, checkpoint)
        compared = corpora.validation_stream() or corpora.stream("train")
        conversion = export_hf(checkpoint, arguments.output, compared, dtype, arguments.overwrite)
    else:
        conversion = export_safetensors(checkpoint, arguments.output, dtype, arguments.overwrite)
    if arguments.json_path != "-":
        print(summary(conversion, arguments.output))
    write_json({"checkpoint": str(checkpoint), "output": str(arguments.output), **conversion.to_dict()}, arguments.json_path)


if __name__ == "__main__":
    run_command(main)
