"""Schedules of the learning rate: of a whole run, and of one phase.

Each class is a kind, and computes its shape.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pretrain.core.section import NonNegative, Section, Share

Ratio = Annotated[float, Field(ge=0)]


def half_cosine(progress: float) -> float:
    """Fall from 1 to 0 along half a cosine while ``progress`` rises from 0 to 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


class ScheduleConfig(Section):
    """The learning rate as a factor of its peak: a linear warm-up, then the shape of the kind.

    A kind is a pure function of the step, so that a resumed run needs no state of a scheduler.
    """

    kind: str
    warmup_steps: NonNegative = 0
    warmup_share: Share = Field(
        0.0, description="share of all steps, rounded to whole ones, instead of warmup_steps"
    )
    min_learning_rate_ratio: Share = Field(0.1, description="last learning rate / peak")
    # In every kind, so that --set schedule.kind=cosine works on a recipe that sets it.
    decay_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="share of all steps that 'wsd' decays over"
    )

    @model_validator(mode="after")
    def _has_one_warmup(self) -> Self:
        if self.warmup_steps and self.warmup_share:
            raise ValueError("give warmup_steps or warmup_share, not both: set the other one to 0")
        return self

    def warmup_of(self, num_steps: int) -> int:
        """Return the steps of the warm-up in a run of ``num_steps``."""
        return self.warmup_steps or round(self.warmup_share * num_steps)

    def factor(self, step: int, num_steps: int) -> float:
        """Return the factor for optimizer step ``step`` (from 0) of ``num_steps``.

        The warm-up rises linearly from 1 / (w + 1) to w / (w + 1).
        """
        # Neither 0 nor 1 is a step of the warm-up: the first step trains, and the peak comes after.
        warmup_steps = self.warmup_of(num_steps)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return self.after_warmup(step, num_steps)

    @abstractmethod
    def after_warmup(self, step: int, num_steps: int) -> float:
        """Return the factor for a step after the warm-up."""

    def _above_floor(self, shape: float) -> float:
        """Scale a shape from [0, 1] to [``min_learning_rate_ratio``, 1]."""
        return self.min_learning_rate_ratio + (1.0 - self.min_learning_rate_ratio) * shape

    def _progress(self, step: int, num_steps: int) -> float:
        """Return the share of the steps after the warm-up that is done."""
        # max: a run may consist of its warm-up.
        warmup_steps = self.warmup_of(num_steps)
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return min(1.0, max(0.0, progress))


class ConstantSchedule(ScheduleConfig):
    """The peak until the end."""

    kind: Literal["constant"]

    def after_warmup(self, step: int, num_steps: int) -> float:
        """Return 1."""
        return 1.0


class LinearSchedule(ScheduleConfig):
    """A linear decay from the end of the warm-up to the end of the run."""

    kind: Literal["linear"]

    def after_warmup(self, step: int, num_steps: int) -> float:
        """Fall linearly over the steps after the warm-up."""
        return self._above_floor(1.0 - self._progress(step, num_steps))


class CosineSchedule(ScheduleConfig):
    """Half a cosine from the warm-up to the end of the run (Loshchilov & Hutter 2017)."""

    kind: Literal["cosine"] = "cosine"

    def after_warmup(self, step: int, num_steps: int) -> float:
        """Fall along half a cosine over the steps after the warm-up."""
        return self._above_floor(half_cosine(self._progress(step, num_steps)))


class WarmupStableDecay(ScheduleConfig):
    """Warm-up, constant, then a linear decay over the last ``decay_share`` of the steps.

    MiniCPM, Hu et al. 2024.
    """

    kind: Literal["wsd"]

    def after_warmup(self, step: int, num_steps: int) -> float:
        """Return 1 until the decay begins, then fall linearly."""
        # At least one step, or a short run would never decay.
        decay_steps = max(1, round(self.decay_share * num_steps))
        progress = (step - (num_steps - decay_steps)) / decay_steps
        return self._above_floor(1.0 - min(1.0, max(0.0, progress)))


class PhaseSchedule(Section):
    """The learning rate over one phase alone, from ``start_ratio`` to ``end_ratio`` of the peak."""

    kind: str
    start_ratio: Ratio = Field(1.0, description="learning rate / peak at the phase's first step")
    end_ratio: Ratio = Field(
        0.0, description="learning rate / peak that the phase ends at; of no use to kind=constant"
    )

    @abstractmethod
    def shape(self, progress: float) -> float:
        """Fall from 1 to 0 while ``progress``, the phase's share that is done, rises to 1."""

    def factor(self, step: int, num_steps: int) -> float:
        """Return the factor for step ``step`` (from 0) of a phase of ``num_steps``.

        ``end_ratio`` would be the factor of the step after the last one.
        """
        return self.end_ratio + (self.start_ratio - self.end_ratio) * self.shape(step / num_steps)


class LinearPhase(PhaseSchedule):
    """A line; from 0 to 1 it is a warm-up."""

    kind: Literal["linear"] = "linear"

    def shape(self, progress: float) -> float:
        """Fall linearly."""
        return 1.0 - progress


class ConstantPhase(PhaseSchedule):
    """``start_ratio`` until the end."""

    kind: Literal["constant"]

    @model_validator(mode="after")
    def _a_constant_has_no_end(self) -> ConstantPhase:
        # The field is in every kind, so that --set can change the kind alone.
        if self.end_ratio:
            raise ValueError(
                "kind=constant keeps start_ratio: leave end_ratio out, or use kind=linear"
            )
        return self

    def shape(self, progress: float) -> float:
        """Return 1."""
        return 1.0


class CosinePhase(PhaseSchedule):
    """Half a cosine."""

    kind: Literal["cosine"]

    def shape(self, progress: float) -> float:
        """Fall along half a cosine."""
        return half_cosine(progress)


class SqrtPhase(PhaseSchedule):
    """1 - sqrt(share of the phase that is done) (Hägele et al. 2024)."""

    kind: Literal["sqrt"]

    def shape(self, progress: float) -> float:
        """Fall fast at first, then ever more slowly."""
        return 1.0 - math.sqrt(progress)
