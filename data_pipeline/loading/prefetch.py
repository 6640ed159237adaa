"""Waiting for a batch that a background thread reads, and telling when it does not come."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from pretrain.config.guards import StalledDataGuard
from pretrain.core.errors import DataError

Value = TypeVar("Value")
# Is told how many seconds a rank has waited, and what is being read.
Tell = Callable[[float, str], None]


class Waiting:
    """How long training waits for its batches.

    Attributes:
        seconds: that it has waited in all.
        reading: what the background thread reads at the moment.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.reading = "nothing yet"
        self._guard: StalledDataGuard | None = None
        self._tell: Tell = lambda seconds, reading: None

    def watch(self, guard: StalledDataGuard | None, tell: Tell) -> None:
        """From now on ``tell`` is called once a wait is as long as the guard says, and again each time it has doubled."""
        self._guard, self._tell = guard, tell

    def result(self, future: Future[Value]) -> Value:
        """What the background thread gives.

        Raises:
            DataError: where it takes longer than the guard's ``stop_seconds``.
        """
        started = time.perf_counter()
        try:
            return self._patiently(future, started)
        finally:
            self.seconds += time.perf_counter() - started

    def _patiently(self, future: Future[Value], started: float) -> Value:
        if self._guard is None:
            return future.result()
        stop = self._guard.stop_seconds
        next_warning = self._guard.warn_seconds
        while True:
            waited = time.perf_counter() - started
            until = next_warning if stop is None else min(next_warning, stop)
            try:
                return future.result(timeout=max(until - waited, 0.0))
            except TimeoutError:
                if future.done():  # it came just now, or reading has failed by a timeout of its own
                    return future.result()
            waited = time.perf_counter() - started
            if stop is not None and waited >= stop:
                raise DataError(
                    f"a batch has not come for {waited:.0f} seconds while reading {self.reading}: "
                    "look at the storage that it lies on, or raise guards.stalled_data.stop_seconds; the same command goes on"
                )
            if waited >= next_warning:
                self._tell(waited, self.reading)
                next_warning *= 2
