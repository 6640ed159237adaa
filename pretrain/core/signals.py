"""Signals as a request to finish the step, save, and exit."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pretrain.core.terminal import survive_hangup

# SIGHUP: the terminal was closed, or the connection to it was lost.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Set by the stop signals. A later Ctrl-C interrupts at once, but a save may finish once.

    Attributes:
        requested: whether there was a signal.
    """

    def __init__(self) -> None:
        self.requested = False
        self._is_saving = False
        self._is_ending = False
        self._has_spared_save = False

    def install(self) -> None:
        """Handle the signals from now on; only possible in the main thread.

        A SIGHUP that is ignored, as ``nohup`` does, stays ignored.
        """
        survive_hangup()
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Inside this block a checkpoint is written: the next Ctrl-C lets it finish."""
        self._is_saving = True
        try:
            yield
        finally:
            self._is_saving = False

    def note_agreed(self) -> None:
        """Note that all ranks have agreed to stop: from here to the end the run is saving."""
        # Another rank may be in its save already, and would wait for this one. And what a thread
        # writes is waited for after the save.
        self._is_ending = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            # Whoever presses Ctrl-C while the run is being saved rarely wants to lose the save.
            if not (self._is_saving or self._is_ending) or self._has_spared_save:
                raise KeyboardInterrupt
            self._has_spared_save = True
        self.requested = True
