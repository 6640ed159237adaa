"""Learning rate and rate of balancing by bias: functions of the step, without state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.config.phases import PhaseSchedule
from pretrain.config.recipe import Recipe, ScheduleConfig
from pretrain.config.timeline import Timeline
from pretrain.model.moe.config import BiasBalancing, RoutedMoE


@dataclass(frozen=True)
class Schedules:
    """What changes from step to step.

    Attributes:
        balancing: of the routers' biases; None for a model without them.
    """

    timeline: Timeline
    learning_rate: ScheduleConfig
    balancing: BiasBalancing | None

    def at(self, step: int) -> tuple[float, float]:
        """For step ``step`` (from 0): learning rate / peak, and how far balancing biases move."""
        factor = run_learning_rate_factor(step, self.timeline, self.learning_rate)
        return factor, self.balance_rate(step)

    def balance_rate(self, step: int) -> float:
        """How far balancing biases move after step ``step`` (from 0)."""
        if self.balancing is None:
            return 0.0
        return balance_update_rate(step, self.timeline.num_steps, self.balancing)


def schedules_of(recipe: Recipe, timeline: Timeline) -> Schedules:
    """The schedules of a run."""
    moe = recipe.model.moe
    balancing = moe.bias_balancing if isinstance(moe, RoutedMoE) else None
    return Schedules(timeline, recipe.schedule, balancing)


def run_learning_rate_factor(step: int, timeline: Timeline, config: ScheduleConfig) -> float:
    """The factor for step ``step`` (from 0) of a run.

    It is of the phase's own schedule, if that has one, or of the recipe's schedule over the whole
    run.
    """
    phase = timeline.at(step)
    if phase.schedule is None:
        return learning_rate_factor(step, timeline.num_steps, config)
    return phase_learning_rate_factor(step - phase.first_step, phase.num_steps, phase.schedule)


def phase_learning_rate_factor(step: int, num_steps: int, config: PhaseSchedule) -> float:
    """The factor for step ``step`` (from 0) of a phase of ``num_steps``.

    Like the other schedules it is at its end after the last step, not in it.
    """
    if config.kind == "constant":
        return config.start_ratio
    progress = step / num_steps
    match config.kind:
        case "linear":
            shape = 1.0 - progress
        case "cosine":
            shape = 0.5 * (1.0 + math.cos(math.pi * progress))
        case "sqrt":
            shape = 1.0 - math.sqrt(progress)
    return config.end_ratio + (config.start_ratio - config.end_ratio) * shape


def learning_rate_factor(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """The factor for optimizer step ``step`` (from 0) of ``num_steps``.

    Warm-up is linear from 1/(w + 1) to w/(w + 1), then the shape of ``config.kind`` follows and
    reaches ``min_learning_rate_ratio`` at the end. ``wsd`` is warm-up, stable, decay (Hu et al.
    2024, MiniCPM), with a linear decay.
    """
    warmup = config.warmup_steps
    floor = config.min_learning_rate_ratio
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.kind == "constant":
        return 1.0
    if config.kind == "wsd":
        decay_steps = max(1, round(config.decay_share * num_steps))
        progress = (step - (num_steps - decay_steps)) / decay_steps
    else:
        progress = (step - warmup) / max(1, num_steps - warmup)
    progress = min(1.0, max(0.0, progress))
    shape = (
        0.5 * (1.0 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1.0 - progress
    )
    return floor + (1.0 - floor) * shape


def balance_update_rate(step: int, num_steps: int, config: BiasBalancing) -> float:
    """How far balancing biases move after optimizer step ``step`` (from 0).

    0 in the frozen end of the run.
    """
    moving_steps = num_steps - round(config.frozen_share * num_steps)
    if step >= moving_steps:
        return 0.0
    progress = step / moving_steps
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.update_rate * shape
