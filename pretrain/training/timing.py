"""The clock of a training: it leaves out validation, saving and files."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from pretrain.guards.progress import Progress

# Given the number of a step, from 1: a block around the step.
AroundStep = Callable[[int], AbstractContextManager[None]]


class StepTimer:
    """Measures the window of steps since the last training record, without pauses.

    Args:
        around: another measurement of steps.

    Attributes:
        pause_seconds: of this process, by what paused it.
    """

    def __init__(self, around: AroundStep = lambda number: nullcontext()) -> None:
        self.pause_seconds: defaultdict[str, float] = defaultdict(float)
        self._around = around
        self._window_started = 0.0
        self._paused_at: float | None = None
        # What the window's first steps took in an earlier process.
        self._carried = 0.0

    def start(self) -> None:
        """Begin to measure; also after a rollback."""
        self._window_started = time.perf_counter() - self._carried

    def resume(self, seconds: float) -> None:
        """Let the next :meth:`start` begin with a window of ``seconds``, from a checkpoint."""
        self._carried = seconds

    def window_seconds(self) -> float:
        """Return how long the window is so far."""
        # perf_counter never goes back, as the time of day may.
        now = time.perf_counter() if self._paused_at is None else self._paused_at
        return now - self._window_started

    def next_window(self) -> float:
        """End the window, and return how long it was."""
        seconds = self.window_seconds()
        # Not "now": no time is lost between two windows.
        self._window_started += seconds
        return seconds

    @contextmanager
    def step(self, progress: Progress) -> Iterator[None]:
        """Count what runs inside as seconds of training."""
        started = time.perf_counter()
        with self._around(progress.step + 1):
            yield
        progress.train_seconds += time.perf_counter() - started

    @contextmanager
    def paused(self, reason: str) -> Iterator[None]:
        """Leave what runs inside out of the window: validation, saving, files of expert usage."""
        # A checkpoint that is saved inside carries the window up to the pause.
        started = time.perf_counter()
        self._paused_at = started
        yield
        self._paused_at = None
        seconds = time.perf_counter() - started
        self._window_started += seconds
        self.pause_seconds[reason] += seconds
