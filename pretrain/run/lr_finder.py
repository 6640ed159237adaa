"""The learning rate range test: a short training whose learning rate grows by the step.

A learning rate at which the loss falls fastest is a good one, one at which it rises again is too
high (Smith 2017, "Cyclical Learning Rates for Training Neural Networks").
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Phase
from pretrain.core.errors import ConfigError
from pretrain.engine.step import StepResult, reduce_steps
from pretrain.run.build import Run, build_run, initial_weights, pack_data, resolve_run
from pretrain.training.schedules import schedules_of

# Weight of the past in the running mean that ends the test, and how far above its lowest it may
# rise before.
RUNNING_SMOOTHING = 0.9
DIVERGED_ABOVE = 1.3
# Steps before that mean is compared with its lowest: it is of few losses until then.
SETTLING_STEPS = 5
# The share of a decade of learning rates that a slope is taken over, and the steps that these are
# at least: a slope over few steps among many is that of noise.
SLOPE_DECADES = 0.6
SLOPE_STEPS = 10
FEWEST_STEPS = 2 * SLOPE_STEPS
# What is left of the learning rate that diverges.
SAFETY = 0.1


@dataclass(frozen=True)
class RangeTest:
    """What the test saw.

    Attributes:
        learning_rates, losses: of each step, peak learning rate of matrices and cross-entropy in
            nats a token.
        smoothed: the losses by :func:`smooth`.
        steepest: the learning rate at which the smoothed loss falls fastest with the logarithm of
            it; None if it never falls.
        diverged: the learning rate at which the smoothed loss has risen to ``DIVERGED_ABOVE`` times
            its lowest, or a gradient was not finite; None if neither happened.
    """

    learning_rates: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float | None
    diverged: float | None

    @property
    def suggestion(self) -> float | None:
        """The lower one of the steepest descent and a tenth of where it diverges.

        None without a descent.
        """
        if self.steepest is None or self.diverged is None:
            return self.steepest
        return min(self.steepest, SAFETY * self.diverged)


def learning_rates(low: float, high: float, steps: int) -> list[float]:
    """``steps`` learning rates from ``low`` to ``high``, each by one factor above the last."""
    return [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]


def running_mean(losses: Sequence[float], weight: float) -> list[float]:
    """Exponential mean with the bias correction of Adam (Kingma & Ba 2015)."""
    mean, result = 0.0, []
    for count, loss in enumerate(losses, 1):
        mean = weight * mean + (1.0 - weight) * loss
        result.append(mean / (1.0 - weight**count))
    return result


def slope_steps(rates: Sequence[float]) -> int:
    """Steps that a slope is taken over: half of those of the test at most."""
    of_decades = SLOPE_DECADES / math.log10(rates[1] / rates[0])
    return max(SLOPE_STEPS, min(round(of_decades), len(rates) // 2))


def smooth(losses: Sequence[float], steps: int) -> list[float]:
    """The mean of running means forwards and backwards, each over half of the ``steps`` of a slope.

    One of them alone lags, and would show every learning rate too high.
    """
    weight = 1.0 - 2.0 / steps
    forwards = running_mean(losses, weight)
    backwards = running_mean(losses[::-1], weight)[::-1]
    return [(before + after) / 2.0 for before, after in zip(forwards, backwards, strict=True)]


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the last of ``losses`` ends the test."""
    means = running_mean(losses, RUNNING_SMOOTHING)
    return len(means) > SETTLING_STEPS and means[-1] > DIVERGED_ABOVE * min(means)


def divergence(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """The first learning rate with ``DIVERGED_ABOVE`` times the lowest loss, after that."""
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
    """The learning rate in the middle of the ``steps`` over which the smoothed loss falls most.

    None if it falls nowhere.
    """
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
    """What a test saw.

    Args:
        losses: may be fewer than ``rates``.
        stopped: whether the last one ended the test, by its height or a gradient.
    """
    steps = slope_steps(rates)
    used = list(rates[: len(losses)])
    smoothed = smooth(losses, steps)
    diverged = (divergence(used, smoothed) or used[-1]) if stopped and used else None
    return RangeTest(
        used, list(losses), smoothed, steepest_descent(used, smoothed, steps), diverged
    )


def run_range_test(
    run: Run, rates: Sequence[float], on_step: Callable[[float, float], None]
) -> RangeTest:
    """Train a step with each learning rate until the loss diverges.

    Every rank must call it; all see the same.

    The other groups of parameters keep their learning rates' ratio to that of matrices. All else is
    the run's own: its data in their order, its phases, and how its balancing biases move.
    """
    engine = run.engine
    timeline = run.resolved.timeline
    schedules = schedules_of(run.resolved.recipe, timeline)
    peak = run.resolved.recipe.optimizer.learning_rate
    losses: list[float] = []
    phase: Phase | None = None
    for step, rate in enumerate(rates):
        if timeline.at(step) is not phase:
            phase = timeline.at(step)
            engine.enter(phase)
        batches = run.loader.step_batches(step)
        result = engine.train_step(batches, rate / peak, schedules.balance_rate(step))
        (means,), _ = reduce_steps([result], engine.topology)
        loss = means.cross_entropy
        if not (math.isfinite(loss) and _gradient_is_finite(result, engine.precision)):
            return evaluate(rates, [*losses, loss] if math.isfinite(loss) else losses, stopped=True)
        losses.append(loss)
        on_step(rate, loss)
        if has_diverged(losses):
            return evaluate(rates, losses, stopped=True)
    return evaluate(rates, losses, stopped=False)


def _gradient_is_finite(result: StepResult, precision: str) -> bool:
    """Whether a step's gradient says nothing against it.

    In fp16 the loss scale may be to blame for one that does.
    """
    if precision == "fp16":
        return True
    # ZeRO reports a norm that is not finite as -1.
    return result.applied and math.isfinite(result.grad_norm) and result.grad_norm >= 0


def prepare(recipe: Recipe, ds_config: dict[str, Any], origin: str, steps: int) -> Run:
    """A training of ``recipe`` without its folder: no log, no TensorBoard, no checkpoints.

    Args:
        origin: of the ds_config, for sentences.

    Raises:
        ConfigError, DataError, CheckpointError: as the training itself would.
    """
    if recipe.branch_from is not None:
        raise ConfigError(
            "a range test cannot continue with the optimizer of branch_from: for its weights alone "
            f"use --set branch_from=null --set initial_weights={recipe.branch_from}"
        )
    logging = recipe.logging.model_copy(update={"tensorboard": False})
    resolved = resolve_run(recipe.model_copy(update={"logging": logging}), ds_config, origin)
    pack_data(resolved)
    # As of a new run, even if there is one already.
    return build_run(resolved, initial_weights(resolved, None), steps)


def draw(test: RangeTest, title: str) -> bytes:
    """The raw and the smoothed loss over the learning rate, with what is suggested, as PNG."""
    import matplotlib  # slow to import, and only this needs it

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
