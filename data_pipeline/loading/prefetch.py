"""Waiting for a batch that a background thread reads, and reporting a batch that does not come."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from pretrain.core.errors import DataError

Value = TypeVar("Value")
# Called with the seconds that a rank has waited, and with what is being read.
StallReport = Callable[[float, str], None]


class PrefetchWait:
    """How long training waits for its batches.

    Attributes:
        seconds: total time waited.
        reading: what the background thread reads at the moment.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.reading = "nothing yet"
        self._warn_seconds: float | None = None
        self._stop_seconds: float | None = None
        self._report: StallReport = lambda seconds, reading: None

    def watch(self, warn_seconds: float, stop_seconds: float | None, report: StallReport) -> None:
        """Call ``report`` once a wait takes ``warn_seconds``, and each time it has doubled.

        Args:
            stop_seconds: a wait that takes as long raises an error; None waits without end.
        """
        self._warn_seconds = warn_seconds
        self._stop_seconds = stop_seconds
        self._report = report

    def result(self, future: Future[Value]) -> Value:
        """The result of the background thread.

        Raises:
            DataError: if it takes longer than ``stop_seconds``.
        """
        started = time.perf_counter()
        try:
            return self._watched_result(future, started)
        finally:
            self.seconds += time.perf_counter() - started

    def _watched_result(self, future: Future[Value], started: float) -> Value:
        if self._warn_seconds is None:
            return future.result()
        stop = self._stop_seconds
        next_warning = self._warn_seconds
        while True:
            waited = time.perf_counter() - started
            until = next_warning if stop is None else min(next_warning, stop)
            try:
                return future.result(timeout=max(until - waited, 0.0))
            except TimeoutError:
                # Two footguns in one exception: the result may have come in this very moment, and
                # reading itself may have failed with a TimeoutError, which has to pass through.
                if future.done():
                    return future.result()
            waited = time.perf_counter() - started
            if stop is not None and waited >= stop:
                raise DataError(
                    f"a batch has not come for {waited:.0f} seconds while reading {self.reading}: "
                    "check the storage that holds it, or raise guards.stalled_data.stop_seconds; "
                    "the same command resumes the run"
                )
            if waited >= next_warning:
                self._report(waited, self.reading)
                next_warning *= 2
