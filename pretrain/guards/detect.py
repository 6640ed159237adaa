"""Decisions about steps that went wrong, from plain values, without communication.

Every rank gets the same values, so every rank decides the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import TypedDict

from pretrain.config.guards import (
    Action,
    GradNormGuard,
    GuardConfig,
    LossTrendGuard,
    SpikeGuard,
    StepGuardConfig,
    SustainedGradNormGuard,
)
from pretrain.core.files import JsonObject
from pretrain.guards.trend import LossTrend, SustainedGradNorm, SustainedState, TrendState

# The standard deviation of a normal distribution in units of its median absolute deviation.
NORMAL_SCALE = 1.4826
# The smallest deviation of a gradient norm's logarithm that a rise is divided by: otherwise norms
# that hardly vary would be violations by a rounding error.
LEAST_LOG_DEVIATION = 0.01
SEVERITY: tuple[Action, ...] = ("warn", "skip", "rollback", "stop")
GuardOfSteps = (
    SpikeGuard | GradNormGuard | LossTrendGuard | SustainedGradNormGuard | StepGuardConfig
)


@dataclass(frozen=True)
class Violation:
    """Something that a guard found.

    Attributes:
        guard: its field in ``guards`` of the recipe.
        action: what is done about it.
        step: from 1.
        reason: what it is, as the end of a sentence about the step.
        in_a_row: steps in a row in which the same guard has found something, this one included;
            steps that were skipped before the guard saw them do not count. For guards of many
            steps, their decisions in a row.
        first: the first of these steps, or of what a decision is about; None if it is this one.
    """

    guard: str
    action: Action
    step: int
    reason: str
    in_a_row: int = 1
    first: int | None = None

    @property
    def from_step(self) -> int:
        """The first step that is suspect."""
        return self.step if self.first is None else self.first


class RobustWindow:
    """The last values of something that drifts, and how far a new one is above them.

    It uses median and median absolute deviation: almost half of the values in the window may be
    outliers, and a new level that stays is normal once it fills half of the window.

    Args:
        least_deviation: lower bound of the robust standard deviation.
    """

    def __init__(self, size: int, least_deviation: float = 1e-12) -> None:
        self.size = size
        self.least_deviation = least_deviation
        # From the oldest to the newest, and sorted: a median is needed at every step.
        self.values: list[float] = []
        self._sorted: list[float] = []

    def rise(self, value: float) -> tuple[float, float] | None:
        """Return how far ``value`` is above the median, and that in robust standard deviations.

        None while there is too little to compare with.
        """
        # A deviation of fewer values would take the first noise for a spike.
        if len(self.values) < max(16, self.size // 4):
            return None
        middle = _middle(self._sorted)
        deviation = NORMAL_SCALE * _middle(sorted([abs(other - middle) for other in self._sorted]))
        return value - middle, (value - middle) / max(deviation, self.least_deviation)

    def add(self, value: float) -> None:
        """Add the newest value, and drop the oldest if the window is full."""
        self.values.append(value)
        insort(self._sorted, value)
        if len(self.values) > self.size:
            # By value: which of several equal ones goes makes no difference.
            del self._sorted[bisect_left(self._sorted, self.values.pop(0))]

    def replace(self, values: list[float]) -> None:
        """Forget all values, and use these."""
        self.values = list(values[-self.size :])
        self._sorted = sorted(self.values)


def _middle(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


class StepGuard(ABC):
    """A guard of a plugin.

    Every rank has one and calls it with the same values, so it must depend on nothing else: ranks
    that decide differently hang in their next collective.
    """

    @abstractmethod
    def look(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Return what is wrong with a step, as the end of a sentence about it; None if nothing is.

        Args:
            loss: mean over all ranks, in nats a token.
            grad_norm: before clipping.
        """

    def state(self) -> JsonObject:
        """Return what a checkpoint has to carry, as JSON."""
        return {}

    def restore(self, state: JsonObject) -> None:  # noqa: B027 - it may have no memory
        """Continue from what :meth:`state` returned.

        An empty state means to start anew: a phase begins, or the checkpoint did not have this
        guard.
        """


class GuardState(TypedDict, total=False):
    """What the guards remember, as a checkpoint carries it; empty at the start.

    Attributes:
        losses, log_norms: windows, from the oldest to the newest.
        trend, sustained: see :mod:`pretrain.guards.trend`.
        more: states of the guards of plugins, by their kind.
        in_a_row, first: see :class:`Violation`, by the guard's name.
    """

    losses: list[float]
    log_norms: list[float]
    trend: TrendState
    sustained: SustainedState
    more: dict[str, JsonObject]
    in_a_row: dict[str, int]
    first: dict[str, int]


class Guards:
    """The guards of a run, with what they remember."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._losses = RobustWindow(config.spike.window_steps) if config.spike else None
        self._log_norms: RobustWindow | None = None
        if config.grad_norm:
            window_steps = config.grad_norm.window_steps
            self._log_norms = RobustWindow(window_steps, LEAST_LOG_DEVIATION)
        self._trend = LossTrend(config.loss_trend) if config.loss_trend else None
        sustained = config.sustained_grad_norm
        self._sustained = SustainedGradNorm(sustained) if sustained else None
        self._more: list[tuple[StepGuardConfig, StepGuard]] = [
            (section, section.implementing_class()(section)) for section in config.more
        ]
        self._in_a_row: dict[str, int] = {}
        self._first: dict[str, int] = {}

    @property
    def may_skip(self) -> bool:
        """Whether a guard may refuse an update, so that it has to see losses before the update."""
        # Not the guard of finite values: the optimizer itself skips a gradient that is not finite.
        config = self.config
        of_many_steps = (config.loss_trend, config.sustained_grad_norm)
        return any(
            guard is not None and guard.action != "warn"
            for guard in (config.spike, config.grad_norm, *of_many_steps, *config.more)
        )

    def look(self, step: int, loss: float, grad_norm: float) -> list[Violation]:
        """Return what the guards find that look at each step: all but those of validations.

        It must be called once for each step, in order, but not for steps whose gradient is not
        finite.

        Args:
            loss: mean cross-entropy of the step, nats a token.
            grad_norm: before clipping.
        """
        spike = self.config.spike
        norm = self.config.grad_norm
        found = []
        if spike is not None and self._losses is not None:
            reason = self._spike(spike, self._losses, loss)
            found.append(self._violation("spike", spike, step, reason))
        if norm is not None and self._log_norms is not None:
            reason = self._high_norm(norm, self._log_norms, grad_norm)
            found.append(self._violation("grad_norm", norm, step, reason))
        # Between two decisions a series of violations neither grows nor ends.
        if self._trend is not None and self._trend.look(step, loss):
            reason, first = self._trend.reason(), self._trend.rises_from
            found.append(self._violation("loss_trend", self._trend.config, step, reason, first))
        if self._sustained is not None and self._sustained.look(step, grad_norm):
            reason, first = self._sustained.reason(), self._sustained.first_step
            found.append(
                self._violation("sustained_grad_norm", self._sustained.config, step, reason, first)
            )
        for section, guard in self._more:
            reason = guard.look(step, loss, grad_norm)
            found.append(self._violation(section.kind, section, step, reason))
        return [violation for violation in found if violation is not None]

    def non_finite(self, step: int) -> Violation:
        """Return the violation of a loss or gradient that is not finite."""
        return Violation(
            "non_finite", self.config.non_finite.action, step, "its loss or gradient is not finite"
        )

    def validation_gap(
        self, step: int, validation_loss: float, training_loss: float | None
    ) -> Violation | None:
        """Return a violation if the validation loss is too far above the training loss.

        None if it is not, or there is no guard.
        """
        guard = self.config.validation_gap
        if guard is None or training_loss is None or validation_loss - training_loss <= guard.nats:
            return None
        reason = (
            f"the validation loss {validation_loss:.4f} is more than {guard.nats:g} above "
            f"the training loss {training_loss:.4f}"
        )
        return Violation("validation_gap", guard.action, step, reason)

    def state(self) -> GuardState:
        """Return what a checkpoint carries: a resumed run decides as the uninterrupted one."""
        state: GuardState = {}
        if self._losses is not None:
            state["losses"] = list(self._losses.values)
        if self._log_norms is not None:
            state["log_norms"] = list(self._log_norms.values)
        if self._trend is not None:
            state["trend"] = self._trend.state()
        if self._sustained is not None:
            state["sustained"] = self._sustained.state()
        if self._more:
            state["more"] = {section.kind: guard.state() for section, guard in self._more}
        state["in_a_row"] = self._in_a_row
        state["first"] = self._first
        return state

    def restore(self, state: GuardState) -> None:
        """Continue from a checkpoint's state; a guard that is not in it starts anew."""
        if self._losses is not None:
            self._losses.replace(state.get("losses", []))
        if self._log_norms is not None:
            self._log_norms.replace(state.get("log_norms", []))
        if self._trend is not None:
            self._trend.restore(state.get("trend", {}))
        if self._sustained is not None:
            self._sustained.restore(state.get("sustained", {}))
        for section, guard in self._more:
            guard.restore(state.get("more", {}).get(section.kind, {}))
        self._in_a_row = dict(state.get("in_a_row", {}))
        self._first = dict(state.get("first", {}))

    @staticmethod
    def _spike(guard: SpikeGuard, window: RobustWindow, loss: float) -> str | None:
        # A NaN in the window would spoil every median after it.
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        # Compare before the value is in the window. A spike enters it too: a loss that stays high
        # must become normal at some time.
        rise = window.rise(loss)
        window.add(loss)
        if rise is None or rise[0] <= guard.min_rise or rise[1] <= guard.deviations:
            return None
        return (
            f"its loss {loss:.4f} is {rise[0]:.4f} above the median of the last "
            f"{len(window.values) - 1} steps, {rise[1]:.1f} robust deviations"
        )

    @staticmethod
    def _high_norm(guard: GradNormGuard, window: RobustWindow, norm: float) -> str | None:
        # Norms vary by factors, not by amounts.
        log_norm = math.log(max(norm, 1e-30))
        rise = window.rise(log_norm)
        window.add(log_norm)
        if guard.max is not None and norm > guard.max:
            return f"its gradient norm {norm:.4g} is above {guard.max:g}"
        if guard.deviations is None or rise is None or rise[1] <= guard.deviations or rise[0] <= 0:
            return None
        return (
            f"its gradient norm {norm:.4g} is {math.exp(rise[0]):.1f} times the median of the last "
            f"steps, {rise[1]:.1f} robust deviations"
        )

    def _violation(
        self,
        name: str,
        guard: GuardOfSteps,
        step: int,
        reason: str | None,
        first: int | None = None,
    ) -> Violation | None:
        """Return the violation that a reason makes; None without one.

        It has the guard's action if there are enough in a row, and is a warning before.

        Args:
            first: the first step that the reason is about; ``step`` by default.
        """
        # One good step ends a series.
        if reason is None:
            self._in_a_row.pop(name, None)
            self._first.pop(name, None)
            return None
        self._in_a_row[name] = self._in_a_row.get(name, 0) + 1
        first = self._first.setdefault(name, step if first is None else first)
        action: Action = guard.action if self._in_a_row[name] >= guard.in_a_row else "warn"
        return Violation(name, action, step, reason, self._in_a_row[name], first)


def severest(violations: list[Violation]) -> Violation | None:
    """Return the violation with the severest action; None if there is none."""
    # Of equals, max returns the first one, in the guards' order.
    return max(violations, key=lambda violation: SEVERITY.index(violation.action), default=None)
