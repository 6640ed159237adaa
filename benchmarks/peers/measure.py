"""How a side is measured: CPU and wall time of repeated calls, peak memory, and the floor."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Measured:
    """Medians over the calls of one process.

    Attributes:
        cpu_seconds: of all threads of this process.
        peak_bytes: resident, of the whole process.
        floor_seconds: CPU time of the FLOPs of its products at the rate of one large product.
    """

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    floor_seconds: float | None = None


def timed(
    call: Callable[[], object],
    *,
    warm_up: int,
    repeats: int,
    prepare: Callable[[], object] | None = None,
    floor_seconds: float | None = None,
) -> Measured:
    """Measure a call; ``prepare`` runs before each one, outside of the clock."""
    cpu, wall = [], []
    for _ in range(warm_up + repeats):
        if prepare is not None:
            prepare()
        began = time.process_time(), time.perf_counter()
        call()
        cpu.append(time.process_time() - began[0])
        wall.append(time.perf_counter() - began[1])
    return Measured(
        statistics.median(cpu[warm_up:]),
        statistics.median(wall[warm_up:]),
        peak_bytes(),
        floor_seconds,
    )


def since_the_start() -> Measured:
    """What this process has taken since it began."""
    import psutil

    return Measured(time.process_time(), time.time() - psutil.Process().create_time(), peak_bytes())


def fast_format() -> str:
    """``bf16``, or ``fp32`` on a CPU that only emulates bf16: there it would take 10 to 50 times.

    The precision that ``train.precision: auto`` chooses here.
    """
    from pretrain.engine.precision import resolve_precision

    return resolve_precision("auto")


def peak_bytes() -> int:
    """The peak of resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds_of_flops(flops: float, dtype: torch.dtype) -> float:
    """CPU seconds of so many FLOPs at the rate of one large product [1024, 2048] x [2048, 2048]."""
    a, b = torch.randn(1024, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    out = torch.empty(1024, 2048, dtype=dtype)
    best = min(
        timed(lambda: torch.mm(a, b, out=out), warm_up=1, repeats=2).cpu_seconds for _ in range(4)
    )
    return flops / (2 * 1024 * 2048 * 2048) * best


def seconds_of_bytes(count: float) -> float:
    """CPU seconds of so many bytes, read or written, at the rate of a copy of 256 MB."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    best = min(
        timed(lambda: target.copy_(source), warm_up=1, repeats=2).cpu_seconds for _ in range(4)
    )
    return count / (2 * source.nbytes) * best
