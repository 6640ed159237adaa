"""Learning rate and rate of balancing by bias: pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

from pretrain.config.schedules import ScheduleConfig, half_cosine
from pretrain.config.timeline import Timeline
from pretrain.model.moe.config import BiasBalancing


def run_learning_rate_factor(step: int, timeline: Timeline, config: ScheduleConfig) -> float:
    """Return the factor for step ``step`` (from 0): its phase's own, or else the recipe's over the whole run."""
    stage = timeline.at(step)
    if stage.schedule is None:
        return config.factor(step, timeline.num_steps)
    return stage.schedule.factor(step - stage.first_step, stage.num_steps)


def balance_update_rate(step: int, num_steps: int, config: BiasBalancing) -> float:
    """Return how far balancing biases move after optimizer step ``step`` (from 0) of ``num_steps``; 0 in the frozen end of the run."""
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
