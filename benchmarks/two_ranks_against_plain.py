#!/usr/bin/env python
"""Two ranks on DeepSpeed's engine (ep_size 2, ZeRO 1) against one plain process with two threads.

Both train the quickstart's model in the same precision on the same global batch. Each round times
some steps of the one, then of the other, so that a change of the machine's speed affects both; the
result is the median of the rounds' ratios. The tokens are random.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import psutil
import torch
from torch import distributed
from tqdm import tqdm

from data_pipeline.loading.batch import Batch
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_topology
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.engine.engine import Engine
from pretrain.engine.precision import DTYPES, resolve_precision
from pretrain.engine.topology import connect, disconnect, free_port
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.optim.param_groups import build_optimizer, parameter_groups, peak_learning_rates

STEPS_A_ROUND = 4


def micro_batches(recipe: Recipe, rank: int, world_size: int) -> list[Batch]:
    """This rank's part of a global batch of random tokens."""
    train = recipe.train
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(
        0,
        recipe.model.vocab_size or 0,
        (train.global_batch_size, train.sequence_length + 1),
        generator=generator,
    )
    parts = tokens.split(train.micro_batch_size)[rank::world_size]
    return [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]


def engine_step(recipe: Recipe, precision: str) -> Callable[[], None]:
    """A function that takes one step on DeepSpeed's engine."""
    topology = connect(recipe.parallel.ep_size)
    accumulation = check_topology(recipe, topology.world_size, 1)
    ds_config = resolve_ds_config(
        {"zero_optimization": {"stage": 1}},
        "the benchmark",
        recipe,
        precision,
        accumulation,
        topology.world_size,
    )
    engine = Engine(recipe, ds_config, precision, topology)
    batches = micro_batches(recipe, topology.rank, topology.world_size)

    def step() -> None:
        engine.train_step(batches, 1.0)

    return step


def plain_step(recipe: Recipe, precision: str) -> Callable[[], None]:
    """A function that takes one step of the same arithmetic without DeepSpeed.

    Low-precision weights, fp32 master weights, clipping, AdamW.
    """
    model = DecoderLM(recipe.model)
    initialize(model, recipe.seed)
    groups = parameter_groups(model, recipe.model, recipe.optimizer)
    working = [parameter for group in groups for parameter in group["params"]]
    # The optimizer updates fp32 copies, which are then rounded into the model's weights.
    masters = [parameter.detach().clone().requires_grad_() for parameter in working]
    remaining = iter(masters)
    peaks = peak_learning_rates(recipe.optimizer)
    optimizer = build_optimizer(
        [group | {"params": [next(remaining) for _ in group["params"]]} for group in groups],
        recipe.optimizer,
    )
    for group in optimizer.param_groups:
        group["lr"] = peaks[group["role"]]
    model.to(DTYPES[precision])
    batches = micro_batches(recipe, 0, 1)
    # Every token counts, so the divisor is constant.
    normalizer = float(recipe.train.micro_batch_size * recipe.train.sequence_length)

    def step() -> None:
        for batch in batches:
            (model(batch.input_ids_BS, batch.labels_BS, normalizer).loss / len(batches)).backward()
        for master, parameter in zip(masters, working, strict=True):
            # The working weights have the gradients; clipping and update are in fp32.
            master.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, recipe.train.grad_clip)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, working, strict=True):
                parameter.copy_(master)
                parameter.grad = None

    return step


def worker(kind: str) -> None:
    """Wait for a line on standard input before each round, and print the round's seconds."""
    ep_size = 2 if kind == "engine" else 1
    recipe = load_recipe(
        "quickstart",
        ["model.vocab_size=4096", f"parallel.ep_size={ep_size}", "logging.tensorboard=false"],
    )
    precision = resolve_precision("auto")
    # Two cores for either side: two ranks of one thread, or one process of two.
    torch.set_num_threads(1 if kind == "engine" else 2)
    step = engine_step(recipe, precision) if kind == "engine" else plain_step(recipe, precision)
    is_main = os.environ.get("RANK", "0") == "0"
    # Warm-up steps.
    for _ in range(2):
        step()
    if is_main:
        print("ready", flush=True)
    while True:
        # Rank 0 alone has a standard input; the other ranks follow its decision.
        go = torch.tensor(1 if not is_main or sys.stdin.readline().strip() == "go" else 0)
        if kind == "engine":
            distributed.broadcast(go, 0)
        if not go.item():
            break
        started = time.perf_counter()
        for _ in range(STEPS_A_ROUND):
            step()
        if is_main:
            print(time.perf_counter() - started, flush=True)
    disconnect()


class Contestant:
    """The processes of one side."""

    def __init__(self, kind: str, ranks: int) -> None:
        common = {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": str(2 // ranks),
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", kind],
                env=os.environ
                | (
                    common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    if ranks > 1
                    else {"OMP_NUM_THREADS": "2"}
                ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(ranks)
        ]
        self.read_line("ready")

    def read_line(self, wanted: str | None = None) -> str:
        """The next line of rank 0, or the next one that equals ``wanted``."""
        output = self.processes[0].stdout
        assert output is not None
        for line in output:
            if wanted is None or line.strip() == wanted:
                return line.strip()
        raise RuntimeError("a benchmark process died: run it with --worker to see why")

    def round(self) -> float:
        """Seconds of one round."""
        self._say("go")
        return float(self.read_line())

    def close(self) -> None:
        """End the processes."""
        self._say("end")
        for process in self.processes:
            process.wait(timeout=60)

    def _say(self, word: str) -> None:
        stdin = self.processes[0].stdin
        assert stdin is not None
        stdin.write(word + "\n")
        stdin.flush()


def main() -> None:
    """Run the rounds, print the result and write it if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", choices=("engine", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    recipe = load_recipe("quickstart")
    tokens = STEPS_A_ROUND * recipe.train.tokens_per_step
    engine = Contestant("engine", 2)
    plain = Contestant("plain", 1)
    pairs = [
        (tokens / engine.round(), tokens / plain.round())
        for _ in tqdm(range(options.rounds), desc="rounds", unit="round")
    ]
    engine.close()
    plain.close()
    result = {
        "date": date.today().isoformat(),
        "cores": psutil.cpu_count(),
        "cpu": torch.cpu.get_capabilities().get("cpu_name", "unknown"),
        "torch": torch.__version__,
        "precision": resolve_precision("auto"),
        "rounds": options.rounds,
        "two_ranks_tokens_per_second": round(median(pair[0] for pair in pairs)),
        "plain_tokens_per_second": round(median(pair[1] for pair in pairs)),
        "median_ratio": round(median(a / b for a, b in pairs), 3),
        "ratios": [round(a / b, 3) for a, b in pairs],
    }
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
