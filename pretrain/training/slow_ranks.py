"""Which rank is slow: the time of its own work in a step, without waiting for other ranks.

All ranks end a step together, so their step times look alike. In a few steps before each record of
times, the time inside collectives is therefore measured and taken off. What is left of a slow rank
is longer than that of the others, whatever it is that slows it: its processor, its disk, its host.
"""

from __future__ import annotations

import logging
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from pretrain.engine.topology import Topology

logger = logging.getLogger(__name__)

# Steps before each record that are measured: the median of a few is not moved by one hiccup.
MEASURED_STEPS = 5
# A rank is slow above this many times the median of all ranks.
SLOW_FACTOR = 1.5
# All collectives of a process group: torch and DeepSpeed both end here. Each waits for other ranks.
# Versions of torch have different names for some of them.
COLLECTIVES = (
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "_allgather_base",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "reduce",
    "_reduce_scatter_base",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
)


@dataclass(frozen=True)
class RankTime:
    """What a rank needs for a step: ``seconds`` of its own work, on the machine ``host``."""

    host: str
    seconds: float


def slow_ranks(times: Sequence[RankTime]) -> dict[int, float]:
    """Return the ranks that are slow, with their time as a multiple of the median."""
    # The lower one of two middle values: of two ranks it is that of the faster one.
    median = statistics.median_low(rank.seconds for rank in times)
    factors = {number: rank.seconds / median for number, rank in enumerate(times)}
    return {number: factor for number, factor in factors.items() if factor > SLOW_FACTOR}


class OwnTime:
    """Measures this rank's own work in chosen steps.

    Args:
        interval: steps between two records of times; the last few before each are measured.
    """

    def __init__(self, topology: Topology, interval: int) -> None:
        self._topology = topology
        self._interval = interval
        self._seconds: list[float] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Measure what runs inside, if step ``number`` (from 1) is one of those."""
        if self._topology.world_size == 1 or -number % self._interval >= MEASURED_STEPS:
            yield
            return
        waited = 0.0

        def timed(collective: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                nonlocal waited
                if not _is_of_the_step():
                    return collective(*arguments, **options)
                # Work that was queued before belongs to this rank.
                self._synchronize()
                started = time.perf_counter()
                work = collective(*arguments, **options)
                # An asynchronous collective is finished here: its caller may wait for it again.
                if work is not None:
                    work.wait()
                self._synchronize()
                waited += time.perf_counter() - started
                return work

            return run

        group = distributed.ProcessGroup
        # As the class holds them: what getattr returns has lost its tie to an object.
        originals = {name: vars(group)[name] for name in COLLECTIVES if name in vars(group)}
        for name in originals:
            setattr(group, name, timed(getattr(group, name)))
        started = time.perf_counter()
        try:
            yield
            self._synchronize()
            self._seconds.append(time.perf_counter() - started - waited)
        finally:
            for name, collective in originals.items():
                setattr(group, name, collective)

    def gather(self) -> list[RankTime] | None:
        """Return the time of every rank since the last call; None if none was measured.

        Every rank must call it.
        """
        measured = self._seconds
        self._seconds = []
        # The same on every rank: they measure the same steps.
        if not measured:
            return None
        return self._topology.all_gather(
            RankTime(socket.gethostname(), statistics.median(measured))
        )

    def _synchronize(self) -> None:
        if self._topology.device.type != "cpu":
            torch.get_device_module(self._topology.device).synchronize()


def _is_of_the_step() -> bool:
    """Whether this thread takes part in the step; a thread that saves meanwhile does not."""
    thread = threading.current_thread()
    # Backward passes on a GPU run in threads of autograd, which Python did not start.
    return thread is threading.main_thread() or thread.name.startswith("Dummy-")


def report(times: Sequence[RankTime]) -> None:
    """Name the slow ranks in the log."""
    median = statistics.median_low(rank.seconds for rank in times)
    for number, factor in slow_ranks(times).items():
        logger.warning(
            "rank %d (host %s) takes %.1f times the median of all ranks for its own work: %.3f s "
            "a step, not %.3f s; all others wait for it, so look at its host",
            number,
            times[number].host,
            factor,
            times[number].seconds,
            median,
        )
