"""This process among all: rank, world size and device, from whatever launcher started it.

Supported are ``deepspeed`` and ``torchrun`` (RANK), ``srun`` (SLURM_PROCID), ``mpirun`` (through
mpi4py), and no launcher at all.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed

from pretrain.core.errors import ConfigError
from pretrain.engine.workarounds.shared_memory_all_reduce import avoid_shared_memory_all_reduce

Value = TypeVar("Value")
# Nodes of a large job may start minutes apart.
RENDEZVOUS_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Topology:
    """This process's rank, and collectives over all ranks.

    Expert-parallel groups are ``ep_size`` neighbouring ranks, as DeepSpeed builds them.
    """

    rank: int
    world_size: int
    ep_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place, and return it; callers clone what they keep."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def any_rank(self, flag: bool) -> bool:
        """True on every rank if ``flag`` is true on any."""
        if self.world_size == 1:
            return flag
        return bool(self.all_reduce_sum(torch.tensor(int(flag), device=self.device)).item())

    def all_gather(self, value: Value) -> list[Value]:
        """The value of every rank, on every rank, in rank order (pickled; not for tensors)."""
        values: list[Value] = [value] * self.world_size
        if self.world_size > 1:
            distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            distributed.barrier()


def free_port() -> int:
    """A loopback port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _from_mpi() -> dict[str, str]:
    # An optional package, and importing it starts MPI.
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    # On one machine the loopback always works; a host name may not resolve.
    on_one_machine = node.size == world.size
    own_address = "127.0.0.1" if on_one_machine else socket.gethostbyname(socket.gethostname())
    # Rank 0 listens: its address and port are everyone's.
    address, port = world.bcast((own_address, free_port()), root=0)
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(node.rank),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", address),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(port)),
    }


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(
            f"started by srun without {' and '.join(missing)}: "
            "export them as launchers/slurm.sbatch does"
        )
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    return {name: environment[source] for name, source in names.items()}


def discover(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torch.distributed needs, from the launcher's own.

    Empty if they are set already.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {}
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return _from_slurm(environment)
    if any(name in environment for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")):
        return _from_mpi()
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def world_size_from_environment(environment: Mapping[str, str]) -> int:
    """How many processes the launcher started, without connecting them."""
    return int((discover(environment) or environment)["WORLD_SIZE"])


def starts_as_first_rank(environment: Mapping[str, str]) -> bool:
    """Whether the launcher made this process rank 0; usable before processes are connected.

    True without a launcher.
    """
    names = ("RANK", "SLURM_PROCID", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
    return next((environment[name] for name in names if name in environment), "0") == "0"


def connect(ep_size: int) -> Topology:
    """Join all processes into torch's default group, and choose this process's device."""
    os.environ.update(discover(os.environ))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        # Before any allocation: every rank of a node would otherwise start a context on GPU 0.
        accelerator.set_device(local_rank)
    # Before init_distributed, which would compile the operation.
    avoid_shared_memory_all_reduce()
    # discover() has set all variables, so DeepSpeed must not look for an MPI launcher itself.
    if not distributed.is_initialized():
        deepspeed.init_distributed(
            auto_mpi_discovery=False, verbose=False, timeout=RENDEZVOUS_TIMEOUT
        )
    return Topology(
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
        ep_size=ep_size,
        device=torch.device(accelerator.current_device_name()),
    )


def disconnect() -> None:
    """Leave the process group, so that no process keeps waiting."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
