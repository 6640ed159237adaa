"""A schedule: a parabola from the peak to the floor."""

from typing import Literal

from pretrain.config.schedules import ScheduleConfig


class ParabolaSchedule(ScheduleConfig):
    """Falls with the square of what is left."""

    kind: Literal["parabola"]

    def after_warmup(self, step: int, num_steps: int) -> float:
        """Return the factor for a step behind the warm-up."""
        return self._above_floor((1.0 - self._progress(step, num_steps)) ** 2)
