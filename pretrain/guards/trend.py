"""Slow trouble: a loss that rises over thousands of steps, gradient norms that stay high.

No single step of these is an outlier, so the guards of single steps stay silent: their window
follows the new level. Both classes here look at whole blocks of steps.
"""

from __future__ import annotations

import math
from statistics import median
from typing import TypedDict

from pretrain.config.guards import TREND_BLOCKS, LossTrendGuard, SustainedGradNormGuard

# Kendall's tau of block and loss from which a rise is one. By chance alone, over 20 blocks: z 4.6,
# p 2e-6 (Mann 1945). A single jump between two even levels reaches 0.53 at most.
LEAST_TAU = 0.75


class TrendState(TypedDict, total=False):
    """What :class:`LossTrend` remembers, as JSON.

    Attributes:
        block_steps: steps of a block; of another length nothing is taken over.
        medians: of the last blocks, from the oldest to the newest.
        first_steps: the first step of each of these blocks.
        values: losses of the block that is not full.
        first_step: of that block.
    """

    block_steps: int
    medians: list[float]
    first_steps: list[int]
    values: list[float]
    first_step: int


class SustainedState(TypedDict, total=False):
    """What :class:`SustainedGradNorm` remembers, as JSON: the norms since the last decision.

    ``first_step`` is the step of the first of them.
    """

    values: list[float]
    first_step: int


class LossTrend:
    """Whether the loss rises over the last ``window_steps``, decided at the end of each block.

    A window is :data:`TREND_BLOCKS` blocks of steps. Their medians leave out single spikes. The
    loss rises if Kendall's tau of block and median is at least :data:`LEAST_TAU`, and the line of
    Theil and Sen (Sen 1968: the median slope of all pairs) is ``min_rise`` higher at the window's
    end than at its beginning.
    """

    def __init__(self, config: LossTrendGuard) -> None:
        self.config = config
        self.block_steps = config.window_steps // TREND_BLOCKS
        self.medians: list[float] = []
        self.first_steps: list[int] = []
        self.values: list[float] = []
        self.first_step = 0

    def look(self, step: int, loss: float) -> bool:
        """Add the loss of a step; return whether this step ends a block, so that it decides."""
        # What is not finite has its own guard, and no place in a checkpoint's JSON.
        if not math.isfinite(loss):
            return False
        if not self.values:
            self.first_step = step
        self.values.append(loss)
        if len(self.values) < self.block_steps:
            return False
        self.medians = [*self.medians, median(self.values)][-TREND_BLOCKS:]
        self.first_steps = [*self.first_steps, self.first_step][-TREND_BLOCKS:]
        self.values = []
        return True

    def reason(self) -> str | None:
        """What is wrong, as the end of a sentence about the step; None if nothing is."""
        if len(self.medians) < TREND_BLOCKS:
            return None
        tau, slope = kendall_and_sen(self.medians)
        rise = slope * (TREND_BLOCKS - 1)
        if tau < LEAST_TAU or rise <= self.config.min_rise:
            return None
        return (
            f"the loss rose over the last {self.config.window_steps} steps, from about "
            f"{self.medians[0]:.4f} to {self.medians[-1]:.4f} (Kendall's tau {tau:.2f})"
        )

    @property
    def rises_from(self) -> int:
        """The first step after the block with the lowest loss of the window."""
        lowest = self.medians.index(min(self.medians))
        return self.first_steps[min(lowest + 1, len(self.first_steps) - 1)]

    def state(self) -> TrendState:
        """Return what a checkpoint carries."""
        return {
            "block_steps": self.block_steps,
            "medians": list(self.medians),
            "first_steps": list(self.first_steps),
            "values": list(self.values),
            "first_step": self.first_step,
        }

    def restore(self, state: TrendState) -> None:
        """Continue from a state; from one of blocks of another length, anew."""
        medians, first_steps = state.get("medians", []), state.get("first_steps", [])
        values = state.get("values", [])
        fits = state.get("block_steps") == self.block_steps and len(values) < self.block_steps
        if not fits or len(medians) != len(first_steps):
            medians, first_steps, values = [], [], []
        self.medians = medians[-TREND_BLOCKS:]
        self.first_steps = first_steps[-TREND_BLOCKS:]
        self.values = list(values)
        self.first_step = state.get("first_step", 0)


class SustainedGradNorm:
    """Whether more than half of the gradient norms of a window are above a limit.

    Windows follow each other without overlap, and each ends with one decision.
    """

    def __init__(self, config: SustainedGradNormGuard) -> None:
        self.config = config
        self.values: list[float] = []
        self.first_step = 0
        self._middle = 0.0

    def look(self, step: int, norm: float) -> bool:
        """Add the norm of a step; return whether this step ends a window, so that it decides."""
        if not math.isfinite(norm):
            return False
        if not self.values:
            self.first_step = step
        self.values.append(norm)
        if len(self.values) < self.config.window_steps:
            return False
        self._middle = median(self.values)
        self.values = []
        return True

    def reason(self) -> str | None:
        """What is wrong, as the end of a sentence about the step; None if nothing is."""
        if self._middle <= self.config.max:
            return None
        return (
            f"the median gradient norm of the last {self.config.window_steps} steps, "
            f"{self._middle:.4g}, is above {self.config.max:g}"
        )

    def state(self) -> SustainedState:
        """Return what a checkpoint carries."""
        return {"values": list(self.values), "first_step": self.first_step}

    def restore(self, state: SustainedState) -> None:
        """Continue from a state; a longer one than the window is begun anew."""
        values = list(state.get("values", []))
        if len(values) >= self.config.window_steps:
            values = []
        self.values = values
        self.first_step = state.get("first_step", 0)


def kendall_and_sen(values: list[float]) -> tuple[float, float]:
    """Kendall's tau of place and value, and the median slope of all pairs of places.

    Ties count as 0 in tau.
    """
    pairs = [
        (later - earlier, values[later] - values[earlier])
        for earlier in range(len(values))
        for later in range(earlier + 1, len(values))
    ]
    concordance = sum((change > 0) - (change < 0) for _, change in pairs)
    return concordance / len(pairs), median(change / distance for distance, change in pairs)
