"""Ctrl-C and SIGTERM as a request to finish the step, save, and exit."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Set by SIGINT, SIGTERM or SIGUSR1; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Handle the three signals from now on; only possible in the main thread."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
