#!/usr/bin/env python
"""What ``train.compile=blocks`` costs and gains: forward and backward of the quickstart's model,
compiled against eager, by turns.

Dense blocks are compiled whole, blocks of dropless experts in their attention half. Wall seconds in
one thread; the ratio is the median of pairs of neighbouring steps, which a change of the machine's
speed meets alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

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
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    loss = model(
        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), float(sequences * 256)
    ).loss
    loss.backward()
    return time.perf_counter() - started, loss.item()


def measure(overrides: list[str], steps: int, sequences: int) -> dict[str, Any]:
    config = load_recipe(
        "quickstart", [*overrides, "model.vocab_size=4096", "parallel.ep_size=1"]
    ).model
    eager, compiled = DecoderLM(config), DecoderLM(config)
    for model in (eager, compiled):
        initialize(model, 1)
    compile_blocks(compiled)
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
    torch.set_num_threads(1)
    path = Path(options.json_path)
    results: dict[str, Any] = (
        json.loads(path.read_text()) if path.is_file() else {}
    )  # blocks that are not measured now stay
    results["date"] = date.today().isoformat()
    results["hardware"] = (
        f"{psutil.cpu_count()} x {platform.processor() or platform.machine()}, torch"
        f" {torch.__version__}, one thread"
    )
    for name in options.blocks:
        results[name] = measure(BLOCKS[name], options.steps, options.sequences)
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        table = Table(*results[name], title=f"{name} blocks")
        table.add_row(*(f"{value:.3g}" for value in results[name].values()))
        Console().print(table)


if __name__ == "__main__":
    main()
