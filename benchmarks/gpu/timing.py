"""How a call is timed on a device, and what is refused where there is none."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pretrain.core.errors import ConfigError

# About 10 ms: longer than the host needs to launch the forward and backward pass of a layer.
FILLER_CYCLES = 20_000_000


@dataclass(frozen=True)
class Timed:
    """Medians of repeated calls.

    Attributes:
        peak_bytes: that the allocator held during the calls; None on a CPU.
    """

    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Bench:
    """Where and how long a part measures.

    Attributes:
        quick: tiny sizes and few calls: the figures mean nothing, a typo shows itself.
    """

    device: torch.device
    quick: bool

    @property
    def calls(self) -> tuple[int, int]:
        """Calls before the clock starts, and calls that are timed."""
        return (1, 2) if self.quick else (5, 20)


def check_device(name: str, quick: bool) -> torch.device:
    """The device to measure on.

    Raises:
        ConfigError: if it is a GPU that is not there, a CPU without ``quick``, or DeepSpeed, which
            the layers are built on, is not installed.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "torch finds no CUDA GPU here: run this on a machine with one, or check the script "
            "alone with --device cpu --quick"
        )
    if name == "cpu" and not quick:
        raise ConfigError("--device cpu checks the script alone and measures nothing: add --quick")
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "DeepSpeed is not installed, and the MoE layers are built on it: bring its packages as "
            "benchmarks/gpu/README.md says"
        )
    return torch.device(name)


def timed(
    bench: Bench, call: Callable[[], object], prepare: Callable[[], object] | None = None
) -> Timed:
    """Time a call; ``prepare`` runs before each one, outside of the clock."""
    warm_up, repeats = bench.calls
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    for number in range(warm_up + repeats):
        if prepare is not None:
            prepare()
        taken = _on_cuda(call) if on_gpu else _on_cpu(call)
        if number >= warm_up:
            seconds.append(taken)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    return Timed(statistics.median(seconds), peak)


def _on_cuda(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # An idle device would wait for each launch, and short kernels would take as long as the host.
    torch.cuda._sleep(FILLER_CYCLES)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _on_cpu(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
