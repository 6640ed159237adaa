"""Decisions about steps that went wrong, from plain values, without communication.

Every rank is given the same values, so every rank decides the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

from pretrain.config.guards import Action, GradNormGuard, GuardConfig, SpikeGuard, StepGuardConfig

# The standard deviation of a normal distribution in units of its median absolute deviation.
NORMAL_SCALE = 1.4826
# The least deviation of a gradient norm's logarithm that is compared with: norms that hardly vary
# would be violations by a rounding otherwise.
LEAST_LOG_DEVIATION = 0.01
SEVERITY: tuple[Action, ...] = ("warn", "skip", "rollback", "stop")


@dataclass(frozen=True)
class Violation:
    """Something that a guard found.

    Attributes:
        guard: its field in ``guards`` of the recipe.
        action: what is done about it.
        step: from 1.
        reason: what it is, as the end of a sentence about the step.
        in_a_row: how many steps in a row the same guard has found something, this one included;
            steps that were skipped before it was asked are passed over.
        first: the first of these; None if it is this one.
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

    Median and median absolute deviation: of the values in the window almost half may be outliers,
    and a level that stays is the new normal once it fills half of it.

    Args:
        least_deviation: what the robust standard deviation is at least.
    """

    def __init__(self, size: int, least_deviation: float = 1e-12) -> None:
        self.size = size
        self.least_deviation = least_deviation
        self.values: list[float] = []  # from the oldest to the newest
        self._sorted: list[float] = []

    def rise(self, value: float) -> tuple[float, float] | None:
        """How far ``value`` is above the median, and how many robust standard deviations that is.

        None while there is too little to compare with.
        """
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
            del self._sorted[bisect_left(self._sorted, self.values.pop(0))]

    def replace(self, values: list[float]) -> None:
        """Forget all values, and take these."""
        self.values = list(values[-self.size :])
        self._sorted = sorted(self.values)


def _middle(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


class StepGuard(ABC):
    """A guard of a plugin.

    Every rank asks its own with the same values, so it must depend on nothing else.
    """

    @abstractmethod
    def look(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Return what is wrong with a step, as the end of a sentence about it; None if nothing is.

        Args:
            loss: mean over all ranks, in nats a token.
            grad_norm: before clipping.
        """

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to carry, as JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027 - it may have no memory
        """Continue from what :meth:`state` gave.

        An empty one means to start anew: a phase begins, or the checkpoint did not have this guard.
        """


class Guards:
    """The guards of a run, with what they remember."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._losses = RobustWindow(config.spike.window_steps) if config.spike else None
        self._log_norms = (
            RobustWindow(config.grad_norm.window_steps, LEAST_LOG_DEVIATION)
            if config.grad_norm
            else None
        )
        self._more: list[tuple[StepGuardConfig, StepGuard]] = [
            (section, section.implementing_class()(section)) for section in config.more
        ]
        self._in_a_row: dict[str, int] = {}
        self._first: dict[str, int] = {}

    @property
    def may_skip(self) -> bool:
        """Whether a guard may have to refuse an update, so that it has to be asked before it."""
        return any(
            guard is not None and guard.action != "warn"
            for guard in (self.config.spike, self.config.grad_norm, *self.config.more)
        )

    def look(self, step: int, loss: float, grad_norm: float) -> list[Violation]:
        """What the guards of single steps find: spike, gradient norm, and those of plugins.

        Every step is to be shown once, in order; those whose gradient is not finite are left out.

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
        for section, guard in self._more:
            reason = guard.look(step, loss, grad_norm)
            found.append(self._violation(section.kind, section, step, reason))
        return [violation for violation in found if violation is not None]

    def non_finite(self, step: int) -> Violation:
        """A loss or gradient that is not finite, for a reason other than fp16's loss scale."""
        return Violation(
            "non_finite", self.config.non_finite.action, step, "its loss or gradient is not finite"
        )

    def validation_gap(
        self, step: int, validation_loss: float, training_loss: float | None
    ) -> Violation | None:
        """A validation loss that is too far above the training loss.

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

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries, as JSON: a resumed run decides as the uninterrupted one."""
        state: dict[str, Any] = {
            name: list(window.values)
            for name, window in self._windows().items()
            if window is not None
        }
        if self._more:
            state["more"] = {section.kind: guard.state() for section, guard in self._more}
        return state | {"in_a_row": self._in_a_row, "first": self._first}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state; one that was not in it starts anew."""
        for name, window in self._windows().items():
            if window is not None:
                window.replace(state.get(name, []))
        for section, guard in self._more:
            guard.restore(state.get("more", {}).get(section.kind, {}))
        self._in_a_row = dict(state.get("in_a_row", {}))
        self._first = dict(state.get("first", {}))

    def _windows(self) -> dict[str, RobustWindow | None]:
        """By their names in a checkpoint."""
        return {"losses": self._losses, "log_norms": self._log_norms}

    @staticmethod
    def _spike(guard: SpikeGuard, window: RobustWindow, loss: float) -> str | None:
        if not math.isfinite(loss):
            return f"its loss is {loss}"
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
        guard: SpikeGuard | GradNormGuard | StepGuardConfig,
        step: int,
        reason: str | None,
    ) -> Violation | None:
        """What a reason amounts to: the guard's action once there are enough in a row, a warning
        before.
        """
        if reason is None:
            self._in_a_row.pop(name, None)
            self._first.pop(name, None)
            return None
        self._in_a_row[name] = self._in_a_row.get(name, 0) + 1
        first = self._first.setdefault(name, step)
        action: Action = guard.action if self._in_a_row[name] >= guard.in_a_row else "warn"
        return Violation(name, action, step, reason, self._in_a_row[name], first)


def severest(violations: list[Violation]) -> Violation | None:
    """The violation whose action goes furthest; None if there is none."""
    return max(violations, key=lambda violation: SEVERITY.index(violation.action), default=None)
