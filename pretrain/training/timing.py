"""The clock of a training: it leaves out validation, saving and files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.guards.progress import Progress


class StepTimer:
    """Measures the window of steps since the last training record, without pauses."""

    def __init__(self) -> None:
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
        yield
        progress.train_seconds += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what runs inside out of the window: validation, saving, files of expert usage."""
        # A checkpoint that is saved inside carries the window up to the pause.
        started = time.perf_counter()
        self._paused_at = started
        yield
        self._paused_at = None
        self._window_started += time.perf_counter() - started
