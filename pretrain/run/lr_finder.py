"""The learning rate range test: a short training whose learning rate grows exponentially from step to step.

Where the loss falls fastest is a good learning rate, where it rises again is too high (Smith 2017, "Cyclical Learning Rates for Training Neural
Networks").
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.loading.packing import prepare_packing
from data_pipeline.loading.shard_loader import Loader, open_loader
from data_pipeline.shards.datasets import data_folders, load_datasets
from pretrain.checkpoint.initialize_from import starting_weights
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_topology
from pretrain.config.timeline import Phase, Timeline
from pretrain.core.errors import ConfigError
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.engine.engine import Engine, reduce_steps
from pretrain.engine.precision import resolve_precision
from pretrain.engine.topology import connect, world_size_from_environment
from pretrain.train import resolve_recipe, share_cores
from pretrain.training.schedules import balance_update_rate

# Weight of the past in the running mean that ends the test, and how far above its lowest it may rise before.
RUNNING_SMOOTHING = 0.9
DIVERGED_ABOVE = 1.3
# Steps before that mean is compared with its lowest: it is of few numbers until then.
SETTLING_STEPS = 5
# The share of a decade of learning rates that a slope is taken over, and the steps that these are at least: a slope of few steps among many is
# that of noise.
SLOPE_DECADES = 0.6
SLOPE_STEPS = 10
FEWEST_STEPS = 2 * SLOPE_STEPS
# What is left of the learning rate that diverges.
SAFETY = 0.1


@dataclass(frozen=True)
class RangeTest:
    """What the test saw.

    Attributes:
        learning_rates, losses: of each step, peak learning rate of matrices and cross-entropy in nats a token.
        smoothed: the losses by :func:`smooth`.
        steepest: the learning rate at which the smoothed loss falls fastest with the logarithm of it; None where it never falls.
        diverged: the learning rate at which the smoothed loss has risen to ``DIVERGED_ABOVE`` times its lowest, or a gradient was not finite.
    """

    learning_rates: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float | None
    diverged: float | None

    @property
    def suggestion(self) -> float | None:
        """The lower one of the steepest descent and a tenth of where it diverges."""
        known = [
            value
            for value in (self.steepest, None if self.diverged is None else SAFETY * self.diverged)
            if value is not None
        ]
        return min(known) if self.steepest is not None else None


def learning_rates(low: float, high: float, steps: int) -> list[float]:
    """``steps`` learning rates from ``low`` to ``high``, each the same factor above the one before."""
    return [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]


def running_mean(losses: Sequence[float], weight: float) -> list[float]:
    """Exponential mean with the bias correction of Adam (Kingma & Ba 2015)."""
    mean, result = 0.0, []
    for count, loss in enumerate(losses, 1):
        mean = weight * mean + (1.0 - weight) * loss
        result.append(mean / (1.0 - weight**count))
    return result


def slope_steps(rates: Sequence[float]) -> int:
    """Steps that a slope is taken over, of a test with these learning rates: of half of them at most."""
    of_decades = SLOPE_DECADES / math.log10(rates[1] / rates[0])
    return max(SLOPE_STEPS, min(round(of_decades), len(rates) // 2))


def smooth(losses: Sequence[float], steps: int) -> list[float]:
    """The mean of running means forwards and backwards, each over half of the ``steps`` of a slope.

    One of them alone lags behind, and would show every learning rate too high.
    """
    weight = 1.0 - 2.0 / steps
    forwards, backwards = running_mean(losses, weight), running_mean(losses[::-1], weight)[::-1]
    return [(before + after) / 2.0 for before, after in zip(forwards, backwards, strict=True)]


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the last of ``losses`` ends the test."""
    means = running_mean(losses, RUNNING_SMOOTHING)
    return len(means) > SETTLING_STEPS and means[-1] > DIVERGED_ABOVE * min(means)


def divergence(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """The first learning rate behind the lowest loss at which it is ``DIVERGED_ABOVE`` times as high."""
    lowest = min(range(len(smoothed)), key=lambda step: smoothed[step])
    return next(
        (
            rates[step]
            for step in range(lowest, len(smoothed))
            if smoothed[step] > DIVERGED_ABOVE * smoothed[lowest]
        ),
        None,
    )


def steepest_descent(rates: Sequence[float], smoothed: Sequence[float], steps: int) -> float | None:
    """The learning rate in the middle of the ``steps`` over which the smoothed loss falls most; None where it falls nowhere."""
    half = steps // 2
    slopes = {
        middle: smoothed[middle + half] - smoothed[middle - half]
        for middle in range(half, len(smoothed) - half)
    }
    if not slopes:
        return None
    best = min(slopes, key=lambda middle: slopes[middle])
    return rates[best] if slopes[best] < 0 else None


def evaluate(rates: Sequence[float], losses: Sequence[float], stopped: bool) -> RangeTest:
    """``losses`` may be fewer than ``rates``; ``stopped`` says that the last one ended the test, by its height or a gradient."""
    steps = slope_steps(rates)
    used, smoothed = list(rates[: len(losses)]), smooth(losses, steps)
    diverged = (divergence(used, smoothed) or used[-1]) if stopped and used else None
    return RangeTest(
        used, list(losses), smoothed, steepest_descent(used, smoothed, steps), diverged
    )


def run_range_test(
    engine: Engine, loader: Loader, rates: Sequence[float], on_step: Callable[[float, float], None]
) -> RangeTest:
    """Trains ``engine`` a step with each learning rate until the loss diverges. Every rank must call it; all see the same numbers.

    The other groups of parameters keep their learning rates' ratio to that of matrices. All else is the run's own: its data in their order, its
    phases, and how its balancing biases move.
    """
    recipe, timeline = engine.recipe, Timeline(engine.recipe)
    peak, moe = recipe.optimizer.learning_rate, recipe.model.routing
    losses: list[float] = []
    stage: Phase | None = None
    for step, rate in enumerate(rates):
        if (now := timeline.at(step)) is not stage:
            engine.enter(stage := now)
        balancing = None if moe is None else moe.bias_balancing
        balance_rate = (
            balance_update_rate(step, timeline.num_steps, balancing)
            if balancing is not None
            else 0.0
        )
        result = engine.train_step(loader.step_batches(step), rate / peak, balance_rate)
        (row,), _ = reduce_steps([result], engine.topology)
        finite = math.isfinite(row[0]) and (
            engine.precision == "fp16"
            or (result.applied and math.isfinite(result.grad_norm) and result.grad_norm >= 0)
        )
        if not finite:
            return evaluate(
                rates, [*losses, row[0]] if math.isfinite(row[0]) else losses, stopped=True
            )
        losses.append(row[0])
        on_step(rate, row[0])
        if has_diverged(losses):
            return evaluate(rates, losses, stopped=True)
    return evaluate(rates, losses, stopped=False)


def prepare(
    recipe: Recipe, ds_config: dict[str, Any], origin: str, stage: int, steps: int
) -> tuple[Engine, Loader]:
    """The engine and the loader of a training of ``recipe``, without its folder: no log, no TensorBoard, no checkpoints.

    Raises:
        ConfigError, DataError, CheckpointError: as the training itself would.
    """
    recipe = recipe.model_copy(
        update={"logging": recipe.logging.model_copy(update={"tensorboard": False})}
    )
    if recipe.branch_from is not None:
        raise ConfigError(
            "a range test cannot go on with the optimizer of branch_from: for its weights alone "
            f"use --set branch_from=null --set initial_weights={recipe.branch_from}"
        )
    datasets = load_datasets(data_folders(recipe))
    datasets.verify()
    accumulation = check_topology(recipe, world_size_from_environment(os.environ), stage)
    precision = resolve_precision(recipe.train.precision)
    recipe = resolve_recipe(recipe, precision, datasets)
    share_cores()
    topology = connect(recipe.parallel.ep_size)
    resolved = resolve_ds_config(
        ds_config, origin, recipe, precision, accumulation, topology.world_size
    )
    if topology.is_main:
        prepare_packing(datasets, recipe.data, Timeline(recipe).block_tokens, progress=True)
    topology.barrier()
    fill = starting_weights(
        recipe, datasets.tokenizer.sha256, Path(os.devnull), topology
    )  # as of a new run, also where there is one
    loader = open_loader(recipe, datasets, topology.rank, topology.world_size)
    loader.require(steps)
    return Engine(recipe, resolved, precision, topology, fill), loader


def draw(test: RangeTest, title: str) -> bytes:
    """The raw and the smoothed loss over the learning rate, with what is suggested, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(
        test.learning_rates, test.losses, color="tab:blue", alpha=0.35, linewidth=1.0, label="loss"
    )
    axes.plot(test.learning_rates, test.smoothed, color="tab:blue", linewidth=1.6, label="smoothed")
    marks = {
        "steepest descent": (test.steepest, "tab:green"),
        "diverged": (test.diverged, "tab:red"),
        "suggestion": (test.suggestion, "black"),
    }
    for name, (rate, colour) in marks.items():
        if rate is not None:
            axes.axvline(
                rate,
                color=colour,
                linestyle="-" if name == "suggestion" else ":",
                linewidth=1.2,
                label=f"{name} {rate:.2g}",
            )
    axes.set(
        xscale="log", xlabel="learning rate", ylabel="cross-entropy, nats a token", title=title
    )
    axes.grid(alpha=0.3)
    axes.legend()
    memory = io.BytesIO()
    figure.savefig(memory, dpi=120, format="png")
    pyplot.close(figure)
    return memory.getvalue()
