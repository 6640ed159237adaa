#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Converts checkpoints to Hugging Face, safetensors, Megatron and others, and from other formats.

Exit codes: 0 converted; 2 usage, or no architecture (with --from hf no recipe) computes what the
model computes; 3 the data for comparing logits; 4 a checkpoint or folder that is damaged,
incomplete or holds foreign code, or values that differ; 5 disk full. Nothing is written under
--output unless the code is 0.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

import torch

from data_pipeline.shards.datasets import data_folders, load_datasets
from pretrain.checkpoint.layout import read_recipe
from pretrain.config.load import load_recipe
from pretrain.config.rules.routers import router_warnings
from pretrain.core.cli import (
    add_json_option,
    add_recipe_option,
    add_set_option,
    command_parser,
    write_json,
)
from pretrain.core.errors import ConfigError, run_command
from pretrain.evaluation.checkpoint import load_matching_corpora, whole_checkpoint
from pretrain.export.convert import Conversion, export_hf, export_safetensors, export_universal
from pretrain.export.deepspeed_moe import import_deepspeed
from pretrain.export.deepspeed_run import import_deepspeed_run
from pretrain.export.gguf import export_gguf
from pretrain.export.import_hf import import_hf
from pretrain.export.megatron.convert import export_megatron, import_megatron
from pretrain.export.parity import TOLERANCE
from pretrain.export.targets import AUTO, target_names
from pretrain.export.writer import parse_bytes
from pretrain.run.resolve import resolve_recipe

EXAMPLES = """\
  python tools/convert_checkpoint.py --checkpoint runs/quickstart/checkpoints/latest \\
      --to hf --output exports/quickstart
  python tools/convert_checkpoint.py --checkpoint runs/quickstart/checkpoints/step_300 \\
      --to hf --target qwen3_moe --dtype bfloat16 --output exports/q3
  python tools/convert_checkpoint.py --checkpoint runs/quickstart/checkpoints/step_300 \\
      --to safetensors --max-shard-size 500MB --output exports/plain
  python tools/convert_checkpoint.py --checkpoint runs/quickstart/checkpoints/latest \\
      --to universal --output exports/universal
  python tools/convert_checkpoint.py --checkpoint runs/quickstart/checkpoints/latest \\
      --to megatron --output exports/megatron
  python tools/convert_checkpoint.py --from megatron megatron_run/checkpoints \\
      --output checkpoints/from_megatron
  python tools/convert_checkpoint.py --from hf downloads/OLMoE-1B-7B --output checkpoints/olmoe
  python tools/convert_checkpoint.py --from deepspeed old_run/global_step9000 \\
      --output exports/old_run
  python tools/convert_checkpoint.py --from deepspeed old_run/global_step9000 --recipe quickstart \\
      --output checkpoints/old_run"""


ORIGINS = ("hf", "deepspeed", "megatron")


def parse_arguments() -> argparse.Namespace:
    """The command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    _add_source(parser)
    _add_target(parser)
    add_json_option(parser)
    arguments = parser.parse_args()
    if (arguments.checkpoint is None) == (arguments.to is not None):
        parser.error(
            "--checkpoint goes with --to hf, safetensors, universal, megatron or gguf; --from"
            " decides what is written"
        )
    if arguments.origin is not None and arguments.origin[0] not in ORIGINS:
        parser.error(f"--from {arguments.origin[0]}: the formats are {', '.join(ORIGINS)}")
    from_deepspeed = arguments.origin is not None and arguments.origin[0] == "deepspeed"
    if not from_deepspeed and arguments.recipe is not None:
        parser.error("--recipe goes with --from deepspeed")
    if arguments.overrides and arguments.recipe is None:
        parser.error("--set goes with --recipe")
    return arguments


def _add_source(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="a run's step_N folder, or the file 'latest' that names one; goes with --to",
    )
    source.add_argument(
        "--from",
        dest="origin",
        nargs=2,
        metavar=("FORMAT", "FOLDER"),
        help=(
            "hf: a Hugging Face folder, which becomes a recipe and a checkpoint of weights alone;"
            " megatron: the same for a folder that Megatron-LM saves to (torch_dist); deepspeed:"
            " any DeepSpeed MoE checkpoint, which becomes safetensors under its own names"
        ),
    )
    add_recipe_option(
        parser,
        help="of --from deepspeed: that of the model, which then becomes a checkpoint with its"
        " optimizer's states, to continue with branch_from; its data must be built",
    )
    add_set_option(parser, help="override any field of --recipe; may be repeated")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        choices=("hf", "safetensors", "universal", "megatron", "gguf"),
        help=(
            "hf: compared with the checkpoint before it is published; universal: of AdamW, dense"
            " or with dropless experts; megatron: weights and arguments for Megatron-LM's --load"
        ),
    )
    parser.add_argument(
        "--target",
        default=AUTO,
        metavar="NAME",
        help=(
            f"of --to hf: {AUTO} (the default) takes the first that is exact of"
            f" {', '.join(target_names())}"
        ),
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the written weights (default: float32)",
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of one file of weights, such as 500MB (default: 5GB)",
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="shards whose held-out text is compared (--to hf); the run's own by default",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export in --output"
    )


def summary(conversion: Conversion, output: Path) -> str:
    """What was written and how it compares with the checkpoint, for the terminal."""
    lines = [
        f"wrote {conversion.tensors} tensors, {conversion.bytes / 1e6:.1f} MB of"
        f" {conversion.dtype}, as {conversion.target} to {output}"
    ]
    if conversion.left_out:
        lines.append(
            f"left out {len(conversion.left_out)} tensors that no next token depends on:"
            f" {', '.join(conversion.left_out)}"
        )
    if conversion.parity is not None:
        parity = conversion.parity
        lines.append(
            f"logits over {parity.windows} windows: max |difference| {parity.max_difference:.2e}"
            f" (allowed {TOLERANCE:.0e}), standard deviation of the logits {parity.logits_std:.2e}"
        )
    if conversion.unchecked is not None:
        lines.append(conversion.unchecked)
    return "\n".join(lines)


def convert(arguments: argparse.Namespace, dtype: torch.dtype) -> Conversion:
    """Runs the conversion that was asked for."""
    output = arguments.output
    overwrite = arguments.overwrite
    shard_bytes = parse_bytes(arguments.max_shard_size)
    if arguments.origin is not None:
        form = arguments.origin[0]
        folder = Path(arguments.origin[1])
        if form in ("hf", "megatron"):
            importer = import_hf if form == "hf" else import_megatron
            conversion = importer(folder, output, overwrite)
            # If the model is trained on, it may need a loss or a bias that balances its experts.
            for warning in router_warnings(read_recipe(output).model):
                print(f"warning: {warning}", file=sys.stderr)
            return conversion
        if arguments.recipe is not None:
            recipe = load_recipe(arguments.recipe, arguments.overrides)
            datasets = load_datasets(data_folders(recipe.data, recipe.data_path))
            recipe = resolve_recipe(recipe, recipe.train.precision, datasets)
            return import_deepspeed_run(folder, recipe, datasets, output, overwrite)
        return import_deepspeed(folder, output, dtype, overwrite, shard_bytes)
    checkpoint = whole_checkpoint(arguments.checkpoint)
    if arguments.to == "safetensors":
        return export_safetensors(checkpoint, output, dtype, overwrite, shard_bytes)
    if arguments.to == "universal":
        return export_universal(checkpoint, output, overwrite)
    if arguments.to == "megatron":
        return export_megatron(checkpoint, output, dtype, overwrite)
    datasets = load_matching_corpora(arguments.data, checkpoint)
    # A small data set may have no validation split; any text shows whether logits are equal.
    compared = datasets.validation_stream() or datasets.stream("train")
    if arguments.to == "gguf":
        return export_gguf(checkpoint, output, compared, dtype, overwrite)
    return export_hf(checkpoint, output, compared, dtype, overwrite, arguments.target, shard_bytes)


def main() -> None:
    """The command."""
    arguments = parse_arguments()
    if arguments.target != AUTO and arguments.to != "hf":
        raise ConfigError(f"--target {arguments.target} goes with --to hf only: leave it out")
    conversion = convert(arguments, getattr(torch, arguments.dtype))
    if arguments.json_path != "-":
        print(summary(conversion, arguments.output))
    came_from = (
        {"source": arguments.origin[1]}
        if arguments.origin is not None
        else {"checkpoint": str(whole_checkpoint(arguments.checkpoint))}
    )
    write_json(
        {**came_from, "output": str(arguments.output), **conversion.to_dict()}, arguments.json_path
    )


command = partial(run_command, main)  # moe-convert

if __name__ == "__main__":
    command()
