"""The measure of memory in all benchmarks: what processes hold, by Linux's ``smaps_rollup``.

Held are anonymous and shared-memory pages, in memory or swapped out. A page that several processes
share is divided among them (proportional set size). Pages of mapped files do not count: the system
keeps them as a cache of the files, even after the process, and reclaims them when it needs memory.
The resident set (RSS) counts both, and a shared page once for every process.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import psutil

MEASURE = (
    "held memory: proportional anonymous and shared-memory pages and swap (Pss_Anon + Pss_Shmem +"
    " SwapPss), without pages of mapped files"
)
COUNTED = ("Pss_Anon", "Pss_Shmem", "SwapPss")
# Seconds between two samples; a shorter peak may be missed.
SAMPLED_SECONDS = 0.05


def held_bytes(pid: int | None = None) -> int:
    """Bytes that a process (by default this one) holds now; 0 if it has ended."""
    try:
        with open(f"/proc/{pid or 'self'}/smaps_rollup", encoding="ascii") as stream:
            # The first line is the address range, then "Name: value kB".
            fields = dict(line.split(":", 1) for line in stream.readlines()[1:])
    except (OSError, ValueError):
        return 0
    return sum(int(fields[name].split()[0]) * 1024 for name in COUNTED)


class PeakMemory:
    """The peak that a process and all its descendants held together in the block, by samples.

    Attributes:
        peak: in bytes.
    """

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._process = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.is_set():
            try:
                family = [self._process, *self._process.children(recursive=True)]
            except psutil.Error:
                return
            self.peak = max(self.peak, sum(held_bytes(member.pid) for member in family))
            self._ended.wait(SAMPLED_SECONDS)
