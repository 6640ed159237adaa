"""The learning rate range test: a short training whose learning rate grows by the step.

A learning rate at which the loss falls fastest is a good one, one at which it rises again is too
high (Smith 2017, "Cyclical Learning Rates for Training Neural Networks").
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Phase
from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject
from pretrain.engine.step import StepResult, reduce_steps
from pretrain.run.build import Run, build_run, initial_weights, pack_data, resolve_run
from pretrain.training.schedules import schedules_of

# Weight of the past in the running mean that ends the test, and the ratio to its lowest value at
# which it does.
RUNNING_SMOOTHING = 0.9
DIVERGED_ABOVE = 1.3
# Steps before that mean is compared: until then it is a mean of few losses.
SETTLING_STEPS = 5
# The decades of learning rates that a slope is taken over, and the fewest steps: a slope over few
# steps is one of noise.
SLOPE_DECADES = 0.6
SLOPE_STEPS = 10
FEWEST_STEPS = 2 * SLOPE_STEPS
# Suggested learning rate / the one at which the loss diverges, at most.
SAFETY = 0.1


@dataclass(frozen=True)
class RangeTest:
    """The result of a test.

    Attributes:
        learning_rates, losses: of each step, peak learning rate of matrices and cross-entropy in
            nats a token.
        smoothed: the losses by :func:`smooth`.
        steepest: the learning rate at which the smoothed loss falls fastest over the logarithm of
            the learning rate; None if it never falls.
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
        """The steepest descent or a tenth of where the loss diverges, whichever is lower.

        None without a descent.
        """
        if self.steepest is None or self.diverged is None:
            return self.steepest
        return min(self.steepest, SAFETY * self.diverged)


def learning_rates(low: float, high: float, steps: int) -> list[float]:
    """Return ``steps`` learning rates from ``low`` to ``high`` in equal ratios."""
    return [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]


def running_mean(losses: Sequence[float], weight: float) -> list[float]:
    """Return exponential means with the bias correction of Adam (Kingma & Ba 2015)."""
    # Without the correction the mean of the first losses would be far too low.
    mean = 0.0
    result = []
    for count, loss in enumerate(losses, 1):
        mean = weight * mean + (1.0 - weight) * loss
        result.append(mean / (1.0 - weight**count))
    return result


def slope_steps(rates: Sequence[float]) -> int:
    """Return the steps that a slope is taken over: at most half of those of the test."""
    of_decades = SLOPE_DECADES / math.log10(rates[1] / rates[0])
    return max(SLOPE_STEPS, min(round(of_decades), len(rates) // 2))


def smooth(losses: Sequence[float], steps: int) -> list[float]:
    """Average running means forwards and backwards, each over half of the ``steps`` of a slope.

    A forward mean alone lags, and would show every learning rate too high.
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
    """Return the first learning rate after the lowest loss with ``DIVERGED_ABOVE`` times that loss.

    None if there is none.
    """
    # Only what follows the lowest loss: before it the loss is high because nothing is learned yet.
    lowest = min(range(len(smoothed)), key=lambda step: smoothed[step])
    for step in range(lowest, len(smoothed)):
        if smoothed[step] > DIVERGED_ABOVE * smoothed[lowest]:
            return rates[step]
    return None


def steepest_descent(rates: Sequence[float], smoothed: Sequence[float], steps: int) -> float | None:
    """Return the learning rate in the middle of the ``steps`` over which the loss falls most.

    None if it falls nowhere.
    """
    # Central differences: the slope belongs to the middle of its steps.
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
    """Return the result of a test.

    Args:
        losses: may be fewer than ``rates``.
        stopped: whether the last loss or its gradient ended the test.
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
    """Train one step with each learning rate until the loss diverges.

    Other groups of parameters keep the ratio of their learning rate to that of matrices. Everything
    else is as in the run: its data in their order, its phases, and how its balancing biases move.
    Every rank must call it, and gets the same result.

    Args:
        on_step: called with learning rate and loss of each step.
    """
    engine = run.engine
    timeline = run.resolved.timeline
    schedules = schedules_of(run.resolved.recipe, timeline)
    peak = run.resolved.recipe.optimizer.learning_rate
    losses: list[float] = []
    phase: Phase | None = None
    for step, rate in enumerate(rates):
        # As Trainer._enter_phase does.
        if timeline.at(step) is not phase:
            phase = timeline.at(step)
            engine.enter(phase)
        batches = run.loader.step_batches(step)
        # The engine takes a factor of the recipe's peak.
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
    """Whether a step's gradient is finite.

    In fp16 one that is not may be due to the loss scale, so it does not count.
    """
    if precision == "fp16":
        return True
    # ZeRO reports a norm that is not finite as -1.
    return result.applied and math.isfinite(result.grad_norm) and result.grad_norm >= 0


def prepare(recipe: Recipe, ds_config: JsonObject, origin: str, steps: int) -> Run:
    """Build a training of ``recipe`` without its folder: no log, no TensorBoard, no checkpoints.

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
    # The monitor would open TensorBoard's file in the run's folder.
    logging = recipe.logging.model_copy(update={"tensorboard": False})
    resolved = resolve_run(recipe.model_copy(update={"logging": logging}), ds_config, origin)
    pack_data(resolved)
    # The weights of a new run, even if the run has checkpoints already.
    return build_run(resolved, initial_weights(resolved, None), steps)


def draw(test: RangeTest, title: str) -> bytes:
    """Draw raw and smoothed loss over the learning rate, with the suggestion, as PNG."""
    import matplotlib  # slow to import, and only this needs it

    # Without a display.
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
    # Closed at once: pyplot keeps every figure alive.
    memory = io.BytesIO()
    figure.savefig(memory, dpi=120, format="png")
    pyplot.close(figure)
    return memory.getvalue()
