#!/usr/bin/env python
"""A constant learning rate with three decay branches, against three cosine runs of equal length.

Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", in
small: the last 15% of each length are a branch of the parent run. Both schedules first choose their
peak learning rate, with a separate seed, at the middle length. Every run is a separate process with
one thread; the spread of the cosine runs' seeds shows which differences are noise.

Needs data/quickstart (tools/preprocess_data.py --recipe quickstart).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import TypedDict

import psutil
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1, 2, 3)
STEP_TOKENS = 8 * 128
TUNING_SEED = 4
DECAY_SHARE = 0.15
# Factors of the learning rates below.
PEAKS = (0.5, 1.0, 2.0, 4.0)
EMBEDDING_RATE = 2e-2
RATE = 5e-3
# The quickstart's model with a quarter of its width and half of its layers.
MODEL = [
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.moe.moe_intermediate_size=64",
    "model.vocab_size=4096",
    "model.attention={kind: gqa, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16, "
    "qk_norm: head}",
]
TRAINING = [
    "train.sequence_length=128",
    "train.micro_batch_size=8",
    "train.global_batch_size=8",
    "train.precision=fp32",
    "parallel.ep_size=1",
    "validation.interval_steps=1000000",
    "logging.tensorboard=false",
]
WARMUP = 12
CONSTANT = f"schedule={{kind: constant, warmup_steps: {WARMUP}}}"
COSINE = f"schedule={{kind: cosine, warmup_steps: {WARMUP}, min_learning_rate_ratio: 0}}"


class LengthResult(TypedDict):
    """The losses at one length, nats per token; ``cosine`` by seed."""

    tokens: int
    branch: float
    cosine: list[float]
    cosine_mean: float
    spread: float
    branch_minus_cosine: float


class Comparison(TypedDict):
    """Both schedules; ``tried`` maps peak learning rates to losses."""

    trained_tokens_with_branches: int
    trained_tokens_of_cosine_runs: int
    ratio: float
    peak_learning_rates: dict[str, float]
    tried: dict[str, dict[float, float]]
    lengths: list[LengthResult]


def train(run: Path, steps: int, data: Path, seed: int, peak: float, overrides: list[str]) -> float:
    """The loss over the whole validation split at the end of one run, in nats per token."""
    rates = [
        f"optimizer.learning_rate={RATE * peak}",
        f"optimizer.embedding_learning_rate={EMBEDDING_RATE * peak}",
    ]
    settings = [
        *MODEL,
        *TRAINING,
        *rates,
        f"seed={seed}",
        f"train.train_tokens={steps * STEP_TOKENS}",
        f"data.path={data}",
        f"run_path={run}",
        *overrides,
    ]
    command = [
        sys.executable,
        str(ROOT / "launchers" / "pretrain.py"),
        "--recipe",
        "quickstart",
        "--json",
        "-",
    ]
    command += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{run.name} failed: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout)["validation_loss_in_training"])


def decay_phases(start: int) -> str:
    """The recipe's phases of a branch that starts to decay at step ``start``."""
    return (
        f"phases=[{{name: trunk, tokens: {start * STEP_TOKENS}}}, {{name: decay, schedule: {{kind:"
        " sqrt}}]"
    )


def decay_start(length: int) -> int:
    """The step at which a run of ``length`` steps starts to decay."""
    return length - round(DECAY_SHARE * length)


def branched(
    lengths: list[int], peak: float, data: Path, folder: Path, bar: tqdm
) -> tuple[dict[int, float], int]:
    """The loss of each length as a branch of one parent run, and the number of steps trained."""
    starts = {length: decay_start(length) for length in lengths}
    # The parent run must have a checkpoint at every branching point.
    interval = f"checkpoint={{interval_steps: {math.gcd(*starts.values())}, keep_last: 99}}"
    # The parent run ends at the last branching point: the rest of each length is its branch's.
    train(folder / "trunk", max(starts.values()), data, SEEDS[0], peak, [CONSTANT, interval])
    bar.update()
    losses = {}
    for length, start in starts.items():
        branch = [
            CONSTANT,
            decay_phases(start),
            f"branch_from={folder / 'trunk' / 'checkpoints' / f'step_{start}'}",
        ]
        losses[length] = train(folder / f"branch-{length}", length, data, SEEDS[0], peak, branch)
        bar.update()
    return losses, max(starts.values()) + sum(length - start for length, start in starts.items())


def best_peak(
    name: str, overrides: list[str], length: int, data: Path, folder: Path, bar: tqdm
) -> tuple[float, dict[float, float]]:
    """The best factor of the learning rates, and the loss of each one tried."""
    losses = {}
    for peak in PEAKS:
        losses[peak] = train(folder / f"{name}-{peak}", length, data, TUNING_SEED, peak, overrides)
        bar.update()
    return min(losses, key=losses.__getitem__), losses


def compare(steps_of_longest: int, data: Path, folder: Path) -> Comparison:
    """Train both schedules at all lengths."""
    # Four, five and six sixths of the longest length.
    lengths = [steps_of_longest * 4 // 6, steps_of_longest * 5 // 6, steps_of_longest]
    with tqdm(total=1 + 2 * len(PEAKS) + len(lengths) * (1 + len(SEEDS)), unit="run") as bar:
        # Each schedule gets its own best learning rate: a shared one would favour one of them.
        cosine_peak, cosine_tried = best_peak("cosine", [COSINE], lengths[1], data, folder, bar)
        peak, tried = best_peak(
            "decayed",
            [CONSTANT, decay_phases(decay_start(lengths[1]))],
            lengths[1],
            data,
            folder,
            bar,
        )
        losses, steps = branched(lengths, peak, data, folder, bar)
        results: list[LengthResult] = []
        for length in lengths:
            cosine: list[float] = []
            for seed in SEEDS:
                cosine.append(
                    train(
                        folder / f"cosine-{length}-{seed}",
                        length,
                        data,
                        seed,
                        cosine_peak,
                        [COSINE],
                    )
                )
                bar.update()
            results.append(
                {
                    "tokens": length * STEP_TOKENS,
                    "branch": losses[length],
                    "cosine": cosine,
                    "cosine_mean": mean(cosine),
                    "spread": stdev(cosine),
                    "branch_minus_cosine": losses[length] - mean(cosine),
                }
            )
    return {
        "trained_tokens_with_branches": steps * STEP_TOKENS,
        "trained_tokens_of_cosine_runs": sum(lengths) * STEP_TOKENS,
        "ratio": round(steps / sum(lengths), 4),
        "peak_learning_rates": {"branches": RATE * peak, "cosine": RATE * cosine_peak},
        "tried": {
            "branches": {RATE * key: loss for key, loss in tried.items()},
            "cosine": {RATE * key: loss for key, loss in cosine_tried.items()},
        },
        "lengths": results,
    }


def main() -> None:
    """Run the comparison, print it and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=360,
        metavar="N",
        help="of the longest length; the others are four and five sixths (default: 360)",
    )
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "quickstart", metavar="FOLDER")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "wsd_branches.json",
        metavar="PATH",
    )
    options = parser.parse_args()
    machine: dict[str, object] = {
        "date": date.today().isoformat(),
        "cores": psutil.cpu_count(logical=False),
        "cpu": platform.processor() or platform.machine(),
    }
    with tempfile.TemporaryDirectory() as folder:
        found = compare(options.steps, options.data.resolve(), Path(folder))
    result = {
        **machine,
        "torch": torch.__version__,
        "model": MODEL,
        "training": TRAINING,
        "decay_share": DECAY_SHARE,
        **found,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
