#!/usr/bin/env python
"""One trunk of constant learning rate with three decay branches, against three cosine runs of the same lengths.

Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", in small: each length's last fifth is a branch
of the trunk. Every run is a process of its own with one thread; the seeds of the cosine runs say what differences mean nothing.

Needs data/quickstart (tools/preprocess_data.py --recipe quickstart).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1, 2, 3)
STEP_TOKENS = 8 * 128
DECAY_SHARE = 0.2
# The quickstart's model with a quarter of its width and half of its layers.
MODEL = [
    "model.hidden_size=64", "model.num_hidden_layers=2", "model.moe.moe_intermediate_size=64", "model.vocab_size=4096",
    "model.attention={kind: gqa, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16, qk_norm: head}",
]  # fmt: skip
TRAINING = [
    "train.sequence_length=128", "train.micro_batch_size=8", "train.global_batch_size=8", "train.precision=fp32", "parallel.ep_size=1",
    "optimizer.learning_rate=5e-3", "optimizer.embedding_learning_rate=2e-2", "validation.interval_steps=1000000", "logging.tensorboard=false",
]  # fmt: skip
WARMUP = 12


def train(run: Path, steps: int, data: Path, seed: int, overrides: list[str]) -> float:
    """The loss over the whole validation split at the end of one run, in nats per token."""
    settings = [*MODEL, *TRAINING, f"seed={seed}", f"train.train_tokens={steps * STEP_TOKENS}", f"data.path={data}", f"run_path={run}", *overrides]
    command = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), "--recipe", "quickstart", "--json", "-"]
    command += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{run.name} failed: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout)["validation_loss_in_training"])


def branched(lengths: list[int], data: Path, folder: Path, bar: tqdm) -> tuple[dict[int, float], int]:
    """The loss of each length as a branch of one trunk, and all steps that were trained."""
    decays = {length: round(DECAY_SHARE * length) for length in lengths}
    starts = {length: length - decay for length, decay in decays.items()}
    constant = f"schedule={{kind: constant, warmup_steps: {WARMUP}}}"
    # An interval that meets every branching point.
    interval = f"checkpoint={{interval_steps: {min(starts.values())}, keep_last: 99}}"
    train(folder / "trunk", max(starts.values()), data, SEEDS[0], [constant, interval])
    bar.update()
    losses = {}
    for length, start in starts.items():
        phases = f"phases=[{{name: trunk, tokens: {start * STEP_TOKENS}}}, {{name: decay, schedule: {{kind: sqrt}}}}]"
        branch = [constant, phases, f"branch_from={folder / 'trunk' / 'checkpoints' / f'step_{start}'}"]
        losses[length] = train(folder / f"branch-{length}", length, data, SEEDS[0], branch)
        bar.update()
    return losses, max(starts.values()) + sum(decays.values())


def compare(third: int, data: Path, folder: Path) -> dict[str, Any]:
    lengths = [third, 2 * third, 3 * third]
    cosine = f"schedule={{kind: cosine, warmup_steps: {WARMUP}, min_learning_rate_ratio: 0}}"
    with tqdm(total=1 + len(lengths) * (1 + len(SEEDS)), unit="run") as bar:
        losses, steps = branched(lengths, data, folder, bar)
        rows = []
        for length in lengths:
            seeds = []
            for seed in SEEDS:
                seeds.append(train(folder / f"cosine-{length}-{seed}", length, data, seed, [cosine]))
                bar.update()
            row = {"tokens": length * STEP_TOKENS, "branch": losses[length], "cosine": seeds, "cosine_mean": mean(seeds), "spread": stdev(seeds)}
            rows.append(row | {"branch_minus_cosine": losses[length] - mean(seeds)})
    return {
        "trained_tokens_with_branches": steps * STEP_TOKENS,
        "trained_tokens_of_cosine_runs": sum(lengths) * STEP_TOKENS,
        "ratio": round(steps / sum(lengths), 4),
        "lengths": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--third-steps", type=int, default=120, metavar="N", help="steps of the shortest length; the others are twice and three times"
    )
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "quickstart", metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "wsd_branches.json", metavar="PATH")
    options = parser.parse_args()
    machine = {"date": date.today().isoformat(), "cores": psutil.cpu_count(logical=False), "cpu": platform.processor() or platform.machine()}
    with tempfile.TemporaryDirectory() as folder:
        found = compare(options.third_steps, options.data.resolve(), Path(folder))
    result = machine | {"torch": torch.__version__, "model": MODEL, "training": TRAINING, "decay_share": DECAY_SHARE} | found
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
