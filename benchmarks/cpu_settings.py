#!/usr/bin/env python
"""What the settings for CPUs save of a training step: kept memory and kernels, grouped experts.

Each measurement is a process of its own, because an allocator remembers; the two sides alternate.
The batches are new in every step, so that experts get new numbers of rows. The losses must be equal
to the last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from data_pipeline.loading.batch import Batch
from pretrain.callbacks.environment import hardware
from pretrain.config.load import load_recipe
from pretrain.core.cli import add_json_option, command_parser, write_json
from pretrain.core.errors import run_command
from pretrain.engine import build, topology
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.engine.engine import Engine

EXAMPLES = """\
  python benchmarks/cpu_settings.py
  python benchmarks/cpu_settings.py --rounds 1 --steps 12"""
VOCABULARY, LENGTH, MICRO_BATCH, MICRO_BATCHES = 8192, 256, 4, 2
SHAPES = {
    "8 experts, bf16": ["train.precision=bf16"],
    "64 experts top-4, bf16": [
        "train.precision=bf16",
        "model.moe.num_experts=64",
        "model.moe.top_k=4",
        "model.moe.moe_intermediate_size=128",
    ],
    "8 experts, fp32": ["train.precision=fp32"],
}
SIDES = ("without", "with")
WARM_UP = 8


def measure_here(shape: str, side: str, steps: int) -> None:
    """Take steps in this process, and print what they took as JSON."""
    settings = [
        f"model.vocab_size={VOCABULARY}",
        "parallel.ep_size=1",
        f"train.micro_batch_size={MICRO_BATCH}",
        f"train.global_batch_size={MICRO_BATCH * MICRO_BATCHES}",
        f"train.sequence_length={LENGTH}",
        *SHAPES[shape],
    ]
    if side == "without":
        topology.keep_kernels = build.keep_freed_memory = lambda: None
        settings.append("model.moe.expert_kernel=loop")
    recipe = load_recipe("quickstart", settings)
    precision = recipe.train.precision
    zero = {"zero_optimization": {"stage": 1}}
    ds_config = resolve_ds_config(zero, "-", recipe, precision, MICRO_BATCHES, 1)
    engine = Engine(recipe, ds_config, precision, topology.connect(1))
    generator = torch.Generator().manual_seed(1)
    seconds, loss = [], 0.0
    for _ in range(steps):
        batches = []
        for _ in range(MICRO_BATCHES):
            # Skewed as words are: experts get unequal numbers of rows.
            draws_BS = torch.randn(MICRO_BATCH, LENGTH + 1, generator=generator).abs()
            ids_BS = (draws_BS * 900).long().clamp(max=VOCABULARY - 1)
            batches.append(Batch(ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous()))
        began = time.process_time()
        result = engine.train_step(batches, 1.0)
        seconds.append(time.process_time() - began)
        loss = float(result.losses.cross_entropy)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([statistics.median(seconds[WARM_UP:]), peak, loss.hex()]))
    topology.disconnect()


def measure(shape: str, side: str, steps: int) -> tuple[float, int, str]:
    """CPU seconds of a step, the peak of resident bytes, and the last loss; in a new process."""
    command = [sys.executable, __file__, "--here", shape, side, "--steps", str(steps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak, loss = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak, loss


def main() -> int:
    """Measure all shapes, print a table and write the results."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--steps", type=int, default=28, metavar="N", help="(default: 28)")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    add_json_option(parser)
    options = parser.parse_args()
    if options.here:
        shape, side = options.here
        measure_here(shape, side, options.steps)
        return 0
    table = Table("shape", "CPU ms, without", "with", "ratio", "peak MB, without", "with")
    shapes = {}
    pairs = [(shape, number) for shape in SHAPES for number in range(options.rounds)]
    found: dict[str, dict[str, list[tuple[float, int, str]]]] = {
        shape: {side: [] for side in SIDES} for shape in SHAPES
    }
    for shape, number in tqdm(pairs, desc="pairs"):
        for side in SIDES if number % 2 else reversed(SIDES):
            found[shape][side].append(measure(shape, side, options.steps))
    for shape, sides in found.items():
        losses = {loss for runs in sides.values() for _, _, loss in runs}
        assert len(losses) == 1, f"{shape}: the losses differ: {losses}"
        ratios = [
            after[0] / before[0]
            for before, after in zip(sides["without"], sides["with"], strict=True)
        ]
        row = {
            side: {
                "cpu_seconds": statistics.median(run[0] for run in runs),
                "peak_bytes": max(run[1] for run in runs),
            }
            for side, runs in sides.items()
        }
        shapes[shape] = row | {"ratios": ratios, "loss": losses.pop()}
        table.add_row(
            shape,
            *(f"{row[side]['cpu_seconds'] * 1e3:.0f}" for side in SIDES),
            f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]",
            *(f"{row[side]['peak_bytes'] / 1e6:.0f}" for side in SIDES),
        )
    Console(stderr=True).print(table)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
        "rounds": options.rounds,
        "steps": options.steps,
        "shapes": shapes,
    }
    write_json(result, options.json_path)
    return 0


if __name__ == "__main__":
    run_command(main)
