#!/usr/bin/env python
"""The kinds of optimizer at equal tokens and at equal seconds, on the quickstart's corpus.

A small model of the quickstart's form, in fp32, at a constant learning rate after a warm-up, so
that every point of a curve is the result of a run that ends there. Each kind first tries its
learning rates with a separate seed, then trains with the best one over three seeds. Seconds are CPU
seconds of one thread inside the steps: other programs on the machine do not count. State bytes are
those of live tensors.

Needs data/quickstart (tools/preprocess_data.py --recipe quickstart), or --data FOLDER.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path
from statistics import mean, median, stdev
from typing import TypedDict

import numpy
import psutil
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from data_pipeline.loading.factory import open_loader
from data_pipeline.loading.packing import Windows
from data_pipeline.loading.validation import validation_batches
from data_pipeline.shards.datasets import load_datasets
from pretrain.config.load import load_recipe
from pretrain.config.loader_plan import loader_plan
from pretrain.config.rules.sections import check_topology
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.engine.engine import Engine
from pretrain.engine.topology import Topology, connect, disconnect

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1, 2, 3)
SWEEP_SEED = 0
MODEL = [
    "model.vocab_size=4096",
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.moe.moe_intermediate_size=128",
    "model.attention={kind: gqa, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16, "
    "qk_norm: head}",
    "train.sequence_length=128",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "train.precision=fp32",
    "parallel.ep_size=1",
    "schedule={kind: constant, warmup_steps: 20}",
    "logging.tensorboard=false",
]
STEP_TOKENS = 512
# Kind -> its weight decay, and the first learning rates to try; none if it takes AdamW's best one.
# The embedding's rate is five times as high, as in the quickstart.
KINDS: dict[str, tuple[float, tuple[float, ...]]] = {
    "adamw": (0.1, (2e-3, 4e-3, 8e-3)),
    "adamw_8bit": (0.1, ()),
    "muon": (0.1, (2e-3, 4e-3, 8e-3)),
    "lion": (0.5, (2e-4, 4e-4, 8e-4)),
}
VALIDATION_WINDOWS = 64
EVERY = 50


class Point(TypedDict):
    """The validation loss (nats per token) after a step, and the CPU seconds until then."""

    step: int
    seconds: float
    loss: float


class Run(TypedDict):
    """One training."""

    curve: list[Point]
    step_seconds: float
    state_bytes_a_parameter: float


class KindResult(TypedDict):
    """One kind over all seeds: means and standard deviations of its losses."""

    learning_rate: float
    loss_at_equal_tokens: float
    loss_at_equal_seconds: float
    spread_at_equal_tokens: float
    spread_at_equal_seconds: float
    step_seconds: float
    state_bytes_a_parameter: float
    sweep: dict[float, float]
    curves: list[list[Point]]


class Summary(TypedDict):
    """All kinds; ``equal_seconds`` is the time at which the fastest run had seen all tokens."""

    steps: int
    tokens: int
    seeds: int
    equal_seconds: float
    kinds: dict[str, KindResult]


def state_bytes(engine: Engine) -> float:
    """Bytes of optimizer state per parameter, from the tensors that exist.

    Without the table of 8-bit levels, which all states share.
    """
    states = engine.optimizer.state.values()
    held = sum(
        value.nbytes
        for state in states
        for name, value in state.items()
        if torch.is_tensor(value) and not name.startswith("qmap")
    )
    return held / sum(parameter.numel() for parameter in engine.model.parameters())


def train(
    kind: str, rate: float, seed: int, steps: int, every: int, data: str, topology: Topology
) -> Run:
    """One training, with the validation loss every ``every`` steps."""
    optimizer = (
        f"{{kind: {kind}, learning_rate: {rate}, embedding_learning_rate: {5 * rate}, weight_decay:"
        f" {KINDS[kind][0]}}}"
    )
    sizes = [
        *MODEL,
        f"optimizer={optimizer}",
        f"seed={seed}",
        f"train.train_tokens={steps * STEP_TOKENS}",
        f"data.path={data}",
    ]
    recipe = load_recipe("quickstart", sizes)
    datasets = load_datasets({"quickstart": data})
    loader = open_loader(recipe.data, datasets, loader_plan(recipe), 0, 1)
    held_out = datasets.validation_stream()
    assert held_out is not None
    windows = Windows(held_out, recipe.train.sequence_length, datasets.pad_id)
    ds_config = resolve_ds_config(
        {"zero_optimization": {"stage": 0}},
        "this benchmark",
        recipe,
        "fp32",
        check_topology(recipe, 1, 0),
        1,
    )
    engine = Engine(recipe, ds_config, "fp32", topology)
    curve: list[Point] = []
    step_seconds: list[float] = []
    for step in range(steps):
        batches = loader.step_batches(step)
        # Loading batches and validation are not timed.
        started = time.process_time()
        engine.train_step(batches, recipe.schedule.factor(step, steps))
        step_seconds.append(time.process_time() - started)
        if (step + 1) % every == 0:
            nll, targets = engine.evaluate(validation_batches(windows, 8, 0, 1, VALIDATION_WINDOWS))
            curve.append({"step": step + 1, "seconds": sum(step_seconds), "loss": nll / targets})
    return {
        "curve": curve,
        "step_seconds": median(step_seconds),
        "state_bytes_a_parameter": state_bytes(engine),
    }


def loss_at(curve: list[Point], seconds: float) -> float:
    """The loss after ``seconds``, interpolated between the points of a curve."""
    # Curves have points at equal steps, not at equal seconds.
    return float(
        numpy.interp(
            seconds, [point["seconds"] for point in curve], [point["loss"] for point in curve]
        )
    )


def sweep(steps: int, data: str, topology: Topology) -> dict[str, dict[float, float]]:
    """The validation loss that each kind reaches with each of its learning rates.

    Rates are doubled until a higher one is no better.
    """
    found: dict[str, dict[float, float]] = {kind: {} for kind in KINDS}
    with tqdm(desc="learning rates", unit="training") as progress:
        for kind, (_, rates) in KINDS.items():
            left = list(rates)
            while left:
                rate = left.pop(0)
                found[kind][rate] = train(kind, rate, SWEEP_SEED, steps, steps, data, topology)[
                    "curve"
                ][-1]["loss"]
                progress.update()
                # The highest rate is the best so far: the optimum may be beyond it.
                if not left and best_rate(found[kind]) == rate:
                    left.append(2 * rate)
    # The same algorithm up to rounding.
    found["adamw_8bit"] = found["adamw"]
    return found


def summarize(
    steps: int, swept: dict[str, dict[float, float]], runs: dict[str, list[Run]]
) -> Summary:
    """All kinds, compared at the moment when the fastest run had seen all tokens."""
    budget = min(run["curve"][-1]["seconds"] for of_kind in runs.values() for run in of_kind)
    kinds: dict[str, KindResult] = {}
    for kind, of_kind in runs.items():
        curves = [run["curve"] for run in of_kind]
        at_tokens = [curve[-1]["loss"] for curve in curves]
        at_seconds = [loss_at(curve, budget) for curve in curves]
        kinds[kind] = {
            "learning_rate": best_rate(swept[kind]),
            "loss_at_equal_tokens": mean(at_tokens),
            "loss_at_equal_seconds": mean(at_seconds),
            "spread_at_equal_tokens": spread(at_tokens),
            "spread_at_equal_seconds": spread(at_seconds),
            "step_seconds": median(run["step_seconds"] for run in of_kind),
            "state_bytes_a_parameter": of_kind[0]["state_bytes_a_parameter"],
            "sweep": swept[kind],
            "curves": curves,
        }
    return {
        "steps": steps,
        "tokens": steps * STEP_TOKENS,
        "seeds": len(curves),
        "equal_seconds": budget,
        "kinds": kinds,
    }


def best_rate(losses: dict[float, float]) -> float:
    """The learning rate with the lowest loss."""
    return min(losses, key=lambda rate: losses[rate])


def spread(values: list[float]) -> float:
    """The standard deviation; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def show(summary: Summary) -> None:
    """Print one line per kind."""
    table = Table(
        "optimizer",
        "learning_rate",
        "loss_at_equal_tokens",
        "spread_at_equal_tokens",
        "loss_at_equal_seconds",
        "step_seconds",
        "state_bytes_a_parameter",
        title=(
            f"{summary['tokens']:,} tokens, or {summary['equal_seconds']:.0f} CPU seconds;"
            f" {summary['seeds']} seeds"
        ),
    )
    for kind, result in summary["kinds"].items():
        values = (
            result["learning_rate"],
            result["loss_at_equal_tokens"],
            result["spread_at_equal_tokens"],
            result["loss_at_equal_seconds"],
            result["step_seconds"],
            result["state_bytes_a_parameter"],
        )
        table.add_row(kind, *(f"{value:.4g}" for value in values))
    Console().print(table)


def plot(summary: Summary, path: Path) -> None:
    """Mean validation loss over tokens and over CPU seconds."""
    import matplotlib

    # No display is needed to write a file.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for kind, result in summary["kinds"].items():
        points = list(zip(*result["curves"], strict=True))
        losses = [mean(point["loss"] for point in same) for same in points]
        axes[0].plot([same[0]["step"] * STEP_TOKENS for same in points], losses, label=kind)
        axes[1].plot([mean(point["seconds"] for point in same) for same in points], losses)
    axes[0].set(xlabel="tokens", ylabel="validation loss, nats")
    axes[1].set(xlabel="CPU seconds of the steps")
    axes[0].legend()
    figure.savefig(path, dpi=70)
    pyplot.close(figure)


def main() -> None:
    """Sweep the learning rates, train all kinds, and write results and figure after each seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=300, help="of each training, 512 tokens each (default: 300)"
    )
    parser.add_argument(
        "--sweep-steps",
        type=int,
        default=100,
        help="of each trial of a learning rate (default: 100)",
    )
    parser.add_argument(
        "--data",
        default=str(ROOT / "data" / "quickstart"),
        metavar="FOLDER",
        help="(default: data/quickstart)",
    )
    parser.add_argument(
        "--json",
        default=str(ROOT / "benchmarks" / "results" / "optimizers.json"),
        metavar="PATH",
        dest="json_path",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    topology = connect(1)
    path = Path(options.json_path)
    machine = (
        f"{psutil.cpu_count()} x {platform.processor() or platform.machine()}, torch"
        f" {torch.__version__}, one thread"
    )
    swept = sweep(options.sweep_steps, options.data, topology)
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    # All kinds with one seed, then with the next: a change of the machine's speed affects all.
    for seed in SEEDS:
        for kind in tqdm(KINDS, desc=f"seed {seed}", unit="training"):
            runs[kind].append(
                train(
                    kind, best_rate(swept[kind]), seed, options.steps, EVERY, options.data, topology
                )
            )
        summary = summarize(options.steps, swept, runs)
        results = {"date": date.today().isoformat(), "hardware": machine, **summary}
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    disconnect()
    plot(summary, path.with_suffix(".png"))
    show(summary)


if __name__ == "__main__":
    main()
