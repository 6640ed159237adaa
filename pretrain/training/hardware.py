"""The hardware that a run has used: device hours, and the energy that counters have seen.

The account is one small file in the run's folder that rank 0 overwrites after every step. It adds
up over all starts of the run: work that was lost and done again has used the hardware too.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

import psutil
import torch
from pydantic import TypeAdapter, ValidationError

from pretrain.checkpoint.saved_state import SavedHardware
from pretrain.checkpoint.state import HardwareUse
from pretrain.engine.energy import gpu_counter, processor_counter, read_joules
from pretrain.engine.topology import Topology

logger = logging.getLogger(__name__)

ACCOUNT = "hardware.json"
# The file has one length, so that each version of it replaces the one before in a single write.
FILE_BYTES = 2048
LONGEST_NAME = 200
# A processor's counter begins again after some minutes of full load. After a longer time without a
# look at it nobody knows how often it did, so that time is not covered.
LONGEST_GAP_SECONDS = 240.0


@dataclass
class RankEnergy:
    """What the counters of this rank have seen since it began.

    A GPU has a counter of its own. The processors of a machine have one together, which local rank
    0 reads for all ranks there.

    Attributes:
        joules: of the counters that this rank reads.
        covered_seconds: during which the energy of this rank's device was counted.
    """

    device: torch.device
    local_rank: int
    joules: float = 0.0
    covered_seconds: float = 0.0

    def __post_init__(self) -> None:
        gpu = gpu_counter(self.device)
        processors = processor_counter()
        own = gpu if self.device.type != "cpu" else processors
        # Processors alone are not the energy of a GPU, so they count only beside it.
        used = [gpu, processors if self.local_rank == 0 else None] if own is not None else []
        self._is_covered = own is not None
        self._counters = [counter for counter in used if counter is not None]
        self._read_at = time.perf_counter()
        self._read_joules = 0.0
        self.counters = sorted({counter.name for counter in self._counters})

    def note(self) -> None:
        """Read the counters; a counter that fails ends the account of this rank."""
        if not self._is_covered:
            return
        read = [read_joules(counter) for counter in self._counters]
        found = [joules for joules in read if joules is not None]
        if len(found) < len(read):
            logger.warning("a counter of energy cannot be read any more: see the model card")
            self._is_covered = False
            return
        now = time.perf_counter()
        gap, used = now - self._read_at, sum(found) - self._read_joules
        self._read_at, self._read_joules = now, sum(found)
        if gap <= LONGEST_GAP_SECONDS and used >= 0:
            self.joules += used
            self.covered_seconds += gap


@dataclass(frozen=True)
class Account:
    """What all starts of a run have used, see :class:`pretrain.checkpoint.state.HardwareUse`."""

    device: str
    is_cpu: bool
    devices: int
    cores_per_device: int
    starts: int = 0
    wall_seconds: float = 0.0
    device_seconds: float = 0.0
    joules: float = 0.0
    covered_seconds: float = 0.0
    counters: list[str] = field(default_factory=list)


def read_account(folder: Path) -> Account | None:
    """Return the account in a run's folder; None if there is none, or it is damaged."""
    path = folder / ACCOUNT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        TypeAdapter(SavedHardware).validate_python(content)
        return Account(**content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, ValidationError):
        logger.warning("%s is damaged: the hardware is counted from now on", path)
        return None


class HardwareMeter:
    """Keeps the account of a run. Every rank must have one: its counters are summed over all ranks.

    Args:
        folder: of the run; None on other ranks than 0.
    """

    def __init__(self, folder: Path | None, topology: Topology) -> None:
        self._folder = folder
        self._topology = topology
        self._energy: RankEnergy | None = None
        # As it was when this process started to train, and as it is; None before, and elsewhere.
        self._begun: Account | None = None
        self._account: Account | None = None
        self._created = 0.0
        self._descriptor: int | None = None

    def begin(self) -> None:
        """Count this start, which is about to take its first step."""
        device = self._topology.device
        self._energy = RankEnergy(device, int(os.environ.get("LOCAL_RANK", "0")))
        if self._folder is None:
            return
        now = Account(
            device=device_name(device),
            is_cpu=device.type == "cpu",
            devices=self._topology.world_size,
            cores_per_device=torch.get_num_threads(),
        )
        before = read_account(self._folder) or now
        # Hours add up over all starts; the devices are those of the newest one.
        self._begun = replace(
            before,
            starts=before.starts + 1,
            device=now.device,
            is_cpu=now.is_cpu,
            devices=now.devices,
            cores_per_device=now.cores_per_device,
            counters=sorted({*before.counters, *self._energy.counters}),
        )
        self._account = self._begun
        self._created = psutil.Process().create_time()
        self._descriptor = os.open(self._folder / ACCOUNT, os.O_WRONLY | os.O_CREAT, 0o666)
        self.note()

    def note(self) -> None:
        """Bring the account up to date after a step or a save, without other ranks."""
        if self._energy is not None:
            self._energy.note()
        if self._begun is None or self._account is None or self._descriptor is None:
            return
        # The time of day may go back; the hours of a run do not.
        wall = max(time.time() - self._created, 0.0) + self._begun.wall_seconds
        wall = max(wall, self._account.wall_seconds)
        own = (wall - self._begun.wall_seconds) * self._topology.world_size
        self._account = replace(
            self._account,
            wall_seconds=wall,
            device_seconds=self._begun.device_seconds + own,
        )
        content = json.dumps(asdict(self._account), ensure_ascii=False).encode()
        # Not synced: it outlasts a kill, and a power failure costs a few steps of the account.
        os.pwrite(self._descriptor, content.ljust(FILE_BYTES - 1) + b"\n", 0)

    def share(self) -> None:
        """Sum the counters of all ranks into the account. Every rank must call it."""
        energy = self._energy
        if energy is None:
            return
        energy.note()
        sums = torch.tensor(
            [energy.joules, energy.covered_seconds],
            dtype=torch.float64,
            device=self._topology.device,
        )
        joules, covered = self._topology.all_reduce_sum(sums).tolist()
        if self._begun is not None and self._account is not None:
            self._account = replace(
                self._account,
                joules=self._begun.joules + joules,
                covered_seconds=self._begun.covered_seconds + covered,
            )
            self.note()

    def measure(self) -> HardwareUse | None:
        """Return the newest account; None on other ranks and before there is one."""
        account = self._account
        if account is None and self._folder is not None:
            # A start that had nothing to do: the run's last account stays.
            account = read_account(self._folder)
        return None if account is None else cast(HardwareUse, asdict(account))


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)[:LONGEST_NAME]
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    names = (
        line.partition(":")[2].strip()
        for line in text.splitlines()
        if line.startswith("model name")
    )
    found = next(names, "") or platform.processor() or platform.machine()
    return found[:LONGEST_NAME]
