#!/usr/bin/env python
"""Cost and gain of ``train.compile=blocks``: the quickstart's model, compiled against eager.

Dense blocks are compiled whole, blocks of dropless experts in their attention half. Wall seconds of
forward and backward pass in one thread. Compiled and eager steps alternate, and the ratio is the
median over pairs of neighbouring steps: a change of the machine's speed affects both alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path
from statistics import median

import psutil
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pretrain.config.load import load_recipe
from pretrain.engine.compile import compile_blocks
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = {
    "dense": ["model.layer_pattern.kind=all_dense", "model.intermediate_size=1024"],
    "dropless": [],
}


def timed_step(model: DecoderLM, seed: int, sequences: int) -> tuple[float, float]:
    """Seconds of a forward and a backward pass over random tokens, and the loss."""
    vocab_size = model.config.vocab_size or 0
    tokens = torch.randint(
        0, vocab_size, (sequences, 257), generator=torch.Generator().manual_seed(seed)
    )
    # Random tokens: the loss does not matter for the time, but both models must agree on it.
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    loss = model(
        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), float(sequences * 256)
    ).loss
    loss.backward()
    return time.perf_counter() - started, loss.item()


def measure(overrides: list[str], steps: int, sequences: int) -> dict[str, float]:
    """Seconds of compiled and eager steps, and how far their losses differ."""
    config = load_recipe(
        "quickstart", [*overrides, "model.vocab_size=4096", "parallel.ep_size=1"]
    ).model
    eager = DecoderLM(config)
    compiled = DecoderLM(config)
    for model in (eager, compiled):
        initialize(model, 1)
    compile_blocks(compiled)
    # The first step compiles; its time is reported apart.
    first, _ = timed_step(compiled, 0, sequences)
    timed_step(eager, 0, sequences)
    pairs = [
        (timed_step(compiled, step, sequences), timed_step(eager, step, sequences))
        for step in tqdm(range(1, steps + 1), unit="pair")
    ]
    return {
        "first_step_seconds": first,
        "compiled_seconds": median(fast[0] for fast, _ in pairs),
        "eager_seconds": median(slow[0] for _, slow in pairs),
        "ratio": median(fast[0] / slow[0] for fast, slow in pairs),
        "largest_loss_difference": max(abs(fast[1] - slow[1]) / slow[1] for fast, slow in pairs),
    }


def main() -> None:
    """Measure the chosen blocks, print a table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="pairs of timed steps (default: 12)")
    parser.add_argument(
        "--sequences", type=int, default=4, help="of 256 tokens in a step (default: 4)"
    )
    parser.add_argument(
        "--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS), help="(default: both)"
    )
    parser.add_argument(
        "--json",
        default=str(ROOT / "benchmarks" / "results" / "compile.json"),
        metavar="PATH",
        dest="json_path",
    )
    options = parser.parse_args()
    # One thread: the ratio then does not depend on how well either side is parallelised.
    torch.set_num_threads(1)
    path = Path(options.json_path)
    # Blocks that are not measured now keep their earlier results.
    results: dict[str, object] = json.loads(path.read_text()) if path.is_file() else {}
    results["date"] = date.today().isoformat()
    results["hardware"] = (
        f"{psutil.cpu_count()} x {platform.processor() or platform.machine()}, torch"
        f" {torch.__version__}, one thread"
    )
    for name in options.blocks:
        measured = measure(BLOCKS[name], options.steps, options.sequences)
        results[name] = measured
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        table = Table(*measured, title=f"{name} blocks")
        table.add_row(*(f"{value:.3g}" for value in measured.values()))
        Console().print(table)


if __name__ == "__main__":
    main()
