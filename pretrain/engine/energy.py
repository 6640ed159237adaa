"""Counters of energy: NVML's of a GPU, RAPL's of a processor, both in joules since their first use.

A counter that this machine does not have, or does not let this process read, is no counter.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Protocol

import torch

logger = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
NVML = "NVML, GPUs"
RAPL = "RAPL, processor packages"


class EnergyCounter(Protocol):
    """Energy since the counter was opened.

    Attributes:
        name: of its kind, for reports.
    """

    name: str

    def joules(self) -> float:
        """Return the energy up to now."""


class NvmlCounter:
    """The energy of one GPU, whoever uses it (nvmlDeviceGetTotalEnergyConsumption; Volta or later).

    Args:
        device: of torch.
    """

    name = NVML

    def __init__(self, device: torch.device) -> None:
        # An optional package; without it, or without a driver, there is no counter.
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        # By its UUID: CUDA_VISIBLE_DEVICES renumbers the devices of torch, and not those of NVML.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        self._first = self._millijoules()

    def joules(self) -> float:
        """Return the energy up to now."""
        return (self._millijoules() - self._first) / 1e3

    def _millijoules(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))


class RaplCounter:
    """The energy of all processor packages of this machine, whoever uses them.

    Each counts microjoules up to a largest value and begins again at 0, after minutes to hours of
    full load: :meth:`joules` must be called more often.

    Args:
        folder: of Linux' powercap files.

    Raises:
        OSError: if there is no package, or a file that this process may not read.
    """

    name = RAPL

    def __init__(self, folder: Path = POWERCAP) -> None:
        # Domains below a package (core, dram) have a second colon, and are parts of it.
        zones = [path for path in sorted(folder.glob("*-rapl:*")) if path.name.count(":") == 1]
        self._zones = [zone for zone in zones if _text(zone / "name").startswith("package")]
        if not self._zones:
            raise OSError(f"no processor package in {folder}")
        self._ranges = [int(_text(zone / "max_energy_range_uj")) for zone in self._zones]
        self._last = [self._read(zone) for zone in self._zones]
        self._microjoules = 0

    def joules(self) -> float:
        """Return the energy up to now."""
        now = [self._read(zone) for zone in self._zones]
        for before, after, most in zip(self._last, now, self._ranges, strict=True):
            # A value below the one before it has begun again after ``most``.
            self._microjoules += after - before if after >= before else after + most - before
        self._last = now
        return self._microjoules / 1e6

    @staticmethod
    def _read(zone: Path) -> int:
        return int(_text(zone / "energy_uj"))


def _text(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()


def gpu_counter(device: torch.device) -> EnergyCounter | None:
    """Return the counter of a GPU; None for any other device, and if it cannot be read."""
    if device.type != "cuda":
        return None
    try:
        return NvmlCounter(device)
    # pynvml's errors have no common base below Exception, and none is worth a training.
    except Exception as error:
        logger.info("the energy of %s cannot be read: %s: %s", device, type(error).__name__, error)
        return None


def processor_counter(folder: Path = POWERCAP) -> EnergyCounter | None:
    """Return the counter of this machine's processors; None if it cannot be read."""
    try:
        return RaplCounter(folder)
    except (OSError, ValueError) as error:
        logger.info("the energy of the processors cannot be read: %s", error)
        return None


def read_joules(counter: EnergyCounter | None) -> float | None:
    """Return what a counter counts; None without one, and from now on if it fails."""
    if counter is not None:
        with contextlib.suppress(Exception):
            return counter.joules()
    return None
