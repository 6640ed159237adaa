"""Learning rate, and rate of balancing by bias: functions of the step, without state."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config.recipe import Recipe
from pretrain.config.schedules import ScheduleConfig, half_cosine
from pretrain.config.timeline import Timeline
from pretrain.model.moe.config import BiasBalancing


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
        """Return learning rate / peak, and how far balancing biases move, for a step (from 0)."""
        factor = run_learning_rate_factor(step, self.timeline, self.learning_rate)
        return factor, self.balance_rate(step)

    def balance_rate(self, step: int) -> float:
        """Return how far balancing biases move after step ``step`` (from 0)."""
        if self.balancing is None:
            return 0.0
        return balance_update_rate(step, self.timeline.num_steps, self.balancing)


def schedules_of(recipe: Recipe, timeline: Timeline) -> Schedules:
    """Return the schedules of a run."""
    moe = recipe.model.routing
    balancing = None if moe is None else moe.bias_balancing
    return Schedules(timeline, recipe.schedule, balancing)


def run_learning_rate_factor(step: int, timeline: Timeline, config: ScheduleConfig) -> float:
    """Return learning rate / peak for step ``step`` (from 0) of a run.

    It follows the phase's schedule, if that has one, or the recipe's over the whole run.
    """
    phase = timeline.at(step)
    # The recipe's schedule counts steps of the run, a phase's schedule those of the phase.
    if phase.schedule is None:
        return config.factor(step, timeline.num_steps)
    return phase.schedule.factor(step - phase.first_step, phase.num_steps)


def balance_update_rate(step: int, num_steps: int, config: BiasBalancing) -> float:
    """Return how far balancing biases move after optimizer step ``step`` (from 0).

    It is 0 in the frozen end of the run.
    """
    # DeepSeek-V3 freezes the biases at the end, so that the routing no longer changes.
    moving_steps = num_steps - round(config.frozen_share * num_steps)
    if step >= moving_steps:
        return 0.0
    progress = step / moving_steps
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": half_cosine(progress),
    }[config.schedule]
    return config.update_rate * shape
