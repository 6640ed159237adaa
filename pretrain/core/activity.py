"""What this process is doing at the moment, for whoever watches over a hanging job.

One record per process, as there is one main thread: that thread writes it, a watching thread reads
it. Writing costs two assignments, so it may be done in every micro batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Activity:
    """The record.

    All ranks call :meth:`note` at the same places and equally often, so that the rank with the
    smallest ``count`` is the one that the others wait for.

    Attributes:
        phase: in words, such as "step 12".
        count: of notes so far; it grows as long as the process makes progress.
        is_running: whether steps are being taken; before and after them anything may take long.
        pauses: open pauses. While there is one, no progress is expected: one rank may pack data,
            write a checkpoint or wait for storage, for hours, while the others wait for it.
    """

    phase: str = "starting"
    count: int = 0
    pauses: int = 0
    is_running: bool = False

    @property
    def expects_progress(self) -> bool:
        """Whether notes must follow each other soon."""
        return self.is_running and not self.pauses

    def note(self, phase: str) -> None:
        """Note the beginning of something that has to end soon."""
        self.phase = phase
        self.count += 1

    def tick(self) -> None:
        """Note progress inside a phase."""
        self.count += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside this block steps are being taken."""
        self.is_running = True
        try:
            yield
        finally:
            self.is_running = False
            self.phase = "ending"

    @contextmanager
    def pause(self, phase: str) -> Iterator[None]:
        """Inside this block the process does something that may take any time."""
        before = self.phase
        self.phase = phase
        self.pauses += 1
        try:
            yield
        finally:
            self.pauses -= 1
            self.phase = before
            # The time of the pause does not count as time without progress.
            self.count += 1


ACTIVITY = Activity()
