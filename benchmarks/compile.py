#!/usr/bin/env python
"""Cost and gain of ``train.compile``: small models, compiled against eager.

``blocks`` compiles dense blocks whole, and blocks of dropless experts in their attention half;
``all`` also what is between the matrix products of experts and head. CPU seconds of forward and
backward pass in one thread, so that other processes of the machine matter little. The forms
alternate, and a ratio is the median over neighbouring steps: a change of the machine's speed
affects all alike.
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
from pretrain.engine.compile import compile_blocks, compile_experts_and_head
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "dense": ("quickstart", ["model.layer_pattern.kind=all_dense", "model.intermediate_size=1024"]),
    "dropless": ("quickstart", []),
    # Project 828's experts have six elementwise operations between their products, and a head that
    # is most of the model.
    "product_swiglu": ("p828_60m", ["model.num_hidden_layers=2"]),
}
# What is compiled of a model.
FORMS = ("eager", "blocks", "all")


def timed_step(model: DecoderLM, seed: int, sequences: int) -> tuple[float, float]:
    """Seconds of a forward and a backward pass over random tokens, and the loss."""
    vocab_size = model.config.vocab_size or 0
    tokens = torch.randint(
        0, vocab_size, (sequences, 257), generator=torch.Generator().manual_seed(seed)
    )
    # Random tokens: the loss does not matter for the time, but both models must agree on it.
    model.zero_grad(set_to_none=True)
    started = time.process_time()
    loss = model(
        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), float(sequences * 256)
    ).loss
    loss.backward()
    return time.process_time() - started, loss.item()


def built(recipe: str, overrides: list[str], form: str) -> DecoderLM:
    """The model with what a form compiles of it."""
    settings = [*overrides, "model.vocab_size=4096", "parallel.ep_size=1"]
    model = DecoderLM(load_recipe(recipe, settings).model)
    initialize(model, 1)
    if form != "eager":
        compile_blocks(model)
    if form == "all":
        compile_experts_and_head(model)
    return model


def measure(recipe: str, overrides: list[str], steps: int, sequences: int) -> dict[str, float]:
    """Seconds of a step in each form, and how far their losses differ."""
    models = {form: built(recipe, overrides, form) for form in FORMS}
    # The first step compiles; its time is reported apart.
    first = {form: timed_step(model, 0, sequences)[0] for form, model in models.items()}
    rounds = [
        {form: timed_step(model, step, sequences) for form, model in models.items()}
        for step in tqdm(range(1, steps + 1), unit="round")
    ]
    result: dict[str, float] = {}
    for form in FORMS:
        result[f"{form}_seconds"] = median(one[form][0] for one in rounds)
        if form == "eager":
            continue
        result[f"{form}_first_step_seconds"] = first[form]
        ratios = sorted(one[form][0] / one["eager"][0] for one in rounds)
        result[f"{form}_ratio"] = median(ratios)
        quarter = len(ratios) // 4
        result[f"{form}_ratio_spread"] = ratios[-1 - quarter] - ratios[quarter]
        result[f"{form}_largest_loss_difference"] = max(
            abs(one[form][1] / one["eager"][1] - 1) for one in rounds
        )
    return result


def main() -> None:
    """Measure the chosen models, print a table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="rounds of timed steps (default: 12)")
    parser.add_argument(
        "--sequences", type=int, default=4, help="of 256 tokens in a step (default: 4)"
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)"
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
    # Models that are not measured now keep their earlier results.
    results: dict[str, object] = json.loads(path.read_text()) if path.is_file() else {}
    results["date"] = date.today().isoformat()
    results["hardware"] = (
        f"{psutil.cpu_count()} x {platform.processor() or platform.machine()}, torch"
        f" {torch.__version__}, one thread"
    )
    for name in options.models:
        measured = measure(*MODELS[name], options.steps, options.sequences)
        results[name] = measured
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        table = Table("what", "value", title=name)
        for what, value in measured.items():
            table.add_row(what, f"{value:.3g}")
        Console().print(table)


if __name__ == "__main__":
    main()
