#!/usr/bin/env python
"""Cost and gain of PEER and of latent attention on a small machine.

* trainings: the quickstart's model on its corpus, three seeds each, with feed-forwards of equal
  FLOPs per token: dense, dropless experts, PEER (all with grouped-query attention); and with latent
  attention (and dropless experts).
* experts: a step with 4,096, 65,536 and 1,048,576 experts of one hidden unit at hidden size 768:
  its time and the memory that the process holds (benchmarks/held_memory.py).
* decoding: the cache of both kinds of attention per token, and how fast they decode.

Needs data/quickstart (tools/preprocess_data.py --recipe quickstart). Every training is a separate
process with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from statistics import mean, median, stdev
from typing import TypedDict

import psutil
import torch
from held_memory import MEASURE, PeakMemory, held_bytes
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pretrain.config.load import load_recipe
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.model.sizes import cache_bytes, model_size

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1, 2, 3)
# 786,432 weights per token: 3 x 256 x 1024; 2 experts of 3 x 256 x 512; PEER's queries, sub-keys of
# 8 heads and 128 experts of 4 hidden units (0.5% less).
FEED_FORWARDS = {
    "dense": ["model.layer_pattern.kind=all_dense", "model.intermediate_size=1024"],
    "dropless": [],
    "peer": [
        "model.moe={kind: peer, product_key_sizes: [64, 64], num_heads: 8, top_k: 16, query_dim:"
        " 152, moe_intermediate_size: 4}"
    ],
}
# 180,224 weights of attention per layer; grouped queries have 196,608.
MLA = [
    "model.attention={kind: mla, num_attention_heads: 4, kv_lora_rank: 64, qk_rope_head_dim: 16,"
    " qk_nope_head_dim: 48, v_head_dim: 64}"
]
VARIANTS = FEED_FORWARDS | {"dropless, latent attention": MLA}
ATTENTIONS = {"gqa": [], "mla": MLA}
TRAINING = [
    "parallel.ep_size=1",
    "train.precision=fp32",
    "train.micro_batch_size=8",
    "schedule.warmup_steps=10",
    "logging.interval_steps=5",
    "logging.tensorboard=false",
    "checkpoint.interval_steps=1000000",
    "validation.interval_steps=1000000",
]
EXPERTS = {"4,096": [64, 64], "65,536": [256, 256], "1,048,576": [1024, 1024]}


class TrainingResult(TypedDict):
    """One variant over all seeds; losses in nats per token."""

    tokens: int
    parameters: int
    flops_per_token: float
    losses: list[float]
    loss_mean: float
    loss_spread: float
    tokens_per_second: float
    peak_gb: float


# What one part of the benchmark found, by variant.
Results = Mapping[str, Mapping[str, object]]


def train(
    name: str, overrides: list[str], seed: int, tokens: int, folder: Path
) -> dict[str, float]:
    """Validation loss, median tokens per second and peak of held memory of one training."""
    run = folder / f"{name}-{seed}"
    settings = [
        *TRAINING,
        *overrides,
        f"seed={seed}",
        f"train.train_tokens={tokens}",
        f"run_path={run}",
        f"data.path={ROOT / 'data/quickstart'}",
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
    # A separate process, so that its peak of memory is that of one training.
    process = subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with PeakMemory(process.pid) as memory:
        _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{name} failed: {errors[-2000:]}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The first record includes the warm-up.
    speeds = [record["tokens_per_second"] for record in records if record["kind"] == "train"][1:]
    summary = json.loads((run / "summary.json").read_text())
    shutil.rmtree(run)
    return {
        "loss": summary["validation_loss_in_training"],
        "tokens_per_second": median(speeds),
        "peak_gb": memory.peak / 1e9,
    }


def compare(variants: dict[str, list[str]], tokens: int, folder: Path) -> dict[str, TrainingResult]:
    """Train all variants with one seed, then with the next.

    So a change of the machine's speed affects all of them.
    """
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for seed in tqdm(SEEDS, desc=" ".join(variants), unit="seed"):
        for name, overrides in variants.items():
            runs[name].append(train(name, overrides, seed, tokens, folder))
            # Printed at once, so that a later failure does not lose it.
            tqdm.write(f"{name}, seed {seed}: {runs[name][-1]}")
    found: dict[str, TrainingResult] = {}
    for name, overrides in variants.items():
        recipe = load_recipe("quickstart", [*TRAINING, *overrides, "model.vocab_size=4096"])
        size = model_size(recipe.model, recipe.train.sequence_length)
        losses = [run["loss"] for run in runs[name]]
        found[name] = {
            "tokens": tokens,
            "parameters": size.parameters_total,
            "flops_per_token": size.flops_per_token,
            "losses": losses,
            "loss_mean": mean(losses),
            "loss_spread": stdev(losses),
            "tokens_per_second": median(run["tokens_per_second"] for run in runs[name]),
            "peak_gb": max(run["peak_gb"] for run in runs[name]),
        }
    return found


def step_times(steps: int) -> dict[str, dict[str, float]]:
    """:func:`time_steps` for each number of experts, in a separate process (--experts)."""
    found: dict[str, dict[str, float]] = {}
    for name, sizes in tqdm(EXPERTS.items(), desc="numbers of experts", unit="size"):
        command = [sys.executable, __file__, "--experts", json.dumps(sizes), "--steps", str(steps)]
        output = subprocess.run(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        found[name] = json.loads(output.splitlines()[-1])
    return found


def time_steps(sizes: list[int], steps: int) -> dict[str, float]:
    """A dense layer and one of PEER, 512 random tokens per step, ZeRO stage 0, AdamW."""
    from data_pipeline.loading.batch import Batch
    from pretrain.config.rules.sections import check_topology
    from pretrain.engine.ds_config import resolve_ds_config
    from pretrain.engine.engine import Engine
    from pretrain.engine.topology import connect, disconnect

    recipe = load_recipe(
        "debug",
        [
            "logging.tensorboard=false",
            "model.vocab_size=4096",
            "model.hidden_size=768",
            "model.intermediate_size=3072",
            "model.attention={kind: gqa, num_attention_heads: 12, num_key_value_heads: 12, "
            "head_dim: 64}",
            "model.feed_forward={kind: gelu}",
            "model.layer_pattern={kind: first_k_dense, k: 1}",
            "train.sequence_length=256",
            "train.global_batch_size=2",
            f"model.moe={{kind: peer, product_key_sizes: {sizes}, query_dim: 256, num_heads: 8, "
            "top_k: 16}",
        ],
    )
    topology = connect(1)
    ds_config = resolve_ds_config(
        {"zero_optimization": {"stage": 0}},
        "this benchmark",
        recipe,
        "fp32",
        check_topology(recipe, 1, 0),
        1,
    )
    engine = Engine(recipe, ds_config, "fp32", topology)
    # Memory before the first step: weights, without moments.
    built = held_bytes()
    times = []
    for step in range(steps + 2):
        tokens = torch.randint(0, 4096, (2, 257), generator=torch.Generator().manual_seed(step))
        started = time.perf_counter()
        engine.train_step(
            [Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)], 1.0
        )
        times.append(time.perf_counter() - started)
    assert engine.sparse_optimizer is not None
    # Only rows that some token chose have optimizer state.
    used = max(int((state.steps > 0).sum()) for state in engine.sparse_optimizer.states.values())
    after = held_bytes()
    disconnect()
    return {
        "step_seconds": median(times[2:]),
        "built_gb": built / 1e9,
        "after_gb": after / 1e9,
        "experts_used": used,
    }


def decoding(variants: dict[str, list[str]], behind: int, new: int) -> dict[str, dict[str, float]]:
    """Greedy tokens per second of one sequence, and the cache's bytes per token in fp32.

    With random weights and one thread, after a prompt of ``behind`` tokens.
    """
    torch.set_num_threads(1)
    models = {}
    for name, overrides in variants.items():
        config = load_recipe("quickstart", [*overrides, "model.vocab_size=4096"]).model
        models[name] = DecoderLM(config).eval()
        initialize(models[name], 1)
    speeds: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        # Models alternate, so that a change of the machine's speed affects all.
        for _ in range(5):
            for name, model in models.items():
                cache = model.new_cache(1, behind + new, "cpu", torch.float32)
                token = model.logits(torch.randint(0, 4096, (1, behind)), cache=cache)[
                    :, -1:
                ].argmax(-1)
                started = time.perf_counter()
                for _ in range(new):
                    token = model.logits(token, cache=cache).argmax(-1)
                speeds[name].append(new / (time.perf_counter() - started))
    return {
        name: {
            "cache_bytes_a_token": cache_bytes(model.config, 1, 4),
            "tokens_per_second": median(speeds[name]),
        }
        for name, model in models.items()
    }


def show(title: str, results: Results) -> None:
    """Print one line per variant, without the losses of single seeds."""
    columns = [key for key in next(iter(results.values())) if key != "losses"]
    table = Table("", *columns, title=title)
    for name, result in results.items():
        table.add_row(name, *(_number(result[column]) for column in columns))
    Console().print(table)


def _number(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def main() -> None:
    """Measure the chosen parts, print a table for each and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, default=204_800, help="of each training (default: 204800, 100 steps)"
    )
    parser.add_argument(
        "--steps", type=int, default=8, help="timed steps for each number of experts (default: 8)"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("trainings", "experts", "decoding"),
        default=("decoding", "experts", "trainings"),
    )
    parser.add_argument("--experts", metavar="SIZES", help=argparse.SUPPRESS)
    parser.add_argument(
        "--json",
        default=str(ROOT / "benchmarks" / "results" / "peer_and_mla.json"),
        metavar="PATH",
        dest="json_path",
    )
    options = parser.parse_args()
    if options.experts:
        print(json.dumps(time_steps(json.loads(options.experts), options.steps)))
        return
    path = Path(options.json_path)
    # Parts that are not measured now keep their earlier results.
    results: dict[str, object] = json.loads(path.read_text()) if path.is_file() else {}
    results["date"] = date.today().isoformat()
    results["memory"] = MEASURE
    results["hardware"] = (
        f"{psutil.cpu_count()} x {platform.processor() or platform.machine()}, torch"
        f" {torch.__version__}, one thread a process"
    )
    with tempfile.TemporaryDirectory() as folder:
        measures: dict[str, Callable[[], Results]] = {
            "trainings": lambda: compare(VARIANTS, options.tokens, Path(folder)),
            "experts": lambda: step_times(options.steps),
            "decoding": lambda: decoding(ATTENTIONS, 2048 - 64, 64),
        }
        for name in options.parts:
            found = measures[name]()
            results[name] = found
            show(name, found)
            path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
