#!/usr/bin/env python
"""Scores a checkpoint on held-out text, beside a bigram that has read the same training windows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the command runs from a checkout, from any folder

from data_pipeline.split import SPLITS
from pretrain.config.cli import add_json_option, command_parser, write_json
from pretrain.config.errors import ConfigError, run_command
from pretrain.evaluation.checkpoint import whole_checkpoint
from pretrain.evaluation.device import choose_device
from pretrain.evaluation.heldout import HeldoutScore, score_checkpoint

EXAMPLES = """\
  python tools/evaluate.py --checkpoint runs/quickstart/checkpoints/latest
  python tools/evaluate.py --checkpoint runs/quickstart/checkpoints/step_300 --max-windows 64 --no-bigram --json -"""


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a step_N folder, or the file 'latest' that names one")
    parser.add_argument("--data", metavar="FOLDER", help="shards of the run's tokenizer; the run's own by default")
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--max-windows", type=int, metavar="N", help="score N windows spread over the split instead of all; leaves out bits per byte")
    parser.add_argument("--no-bigram", action="store_true", help="leave out the baseline")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="windows at once; the recipe's micro batch by default")
    add_json_option(parser)
    return parser.parse_args()


def table(score: HeldoutScore) -> str:
    """The result as aligned lines."""
    bits = "needs all windows" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
    rows = [
        ("step", f"{score.step}"),
        ("targets", f"{score.targets} tokens of the {score.split} split"),
        ("loss", f"{score.loss:.4f} nats per token"),
        ("perplexity", f"{score.perplexity:.3f}"),
        ("bits per byte", bits),
    ]
    if score.bigram is not None:
        rows += [
            ("bigram loss", f"{score.bigram.loss:.4f} nats per token, fitted on {score.bigram.windows} samples that the model has seen"),
            ("better than bigram by", f"{score.better_by:.4f} nats per token"),
        ]
    return "\n".join(f"{name:<22} {value}" for name, value in rows)


def main() -> None:
    arguments = parse_arguments()
    for option in ("max_windows", "batch_size"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')} is {value}: give 1 or more")
    checkpoint = whole_checkpoint(arguments.checkpoint)
    device = choose_device(arguments.device)
    score = score_checkpoint(
        checkpoint, arguments.data, arguments.split, device, arguments.batch_size, arguments.max_windows, not arguments.no_bigram
    )
    if arguments.json_path != "-":
        print(table(score))
    write_json({"checkpoint": str(checkpoint), **score.to_dict()}, arguments.json_path)


if __name__ == "__main__":
    run_command(main)
