"""This process among all: rank, world size and device, from whatever launcher started it.

Supported are ``deepspeed`` and ``torchrun`` (RANK), ``srun`` (SLURM_PROCID), ``mpirun`` (through
mpi4py), and no launcher at all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed

from pretrain.core.activity import ACTIVITY
from pretrain.core.errors import ConfigError, PeerLostError, is_peer_loss
from pretrain.engine.cpu_tuning import keep_kernels
from pretrain.engine.rendezvous import (
    RENDEZVOUS_TIMEOUT,
    address_towards,
    choose_interface,
    is_loopback,
    outward_address,
    store_opener,
    wait_for_host,
)
from pretrain.engine.stacks import has_log, write_stacks
from pretrain.engine.watchdog import RUN_AGAIN, Watchdog
from pretrain.engine.workarounds.group_timeouts import wait_long_in_all_groups
from pretrain.engine.workarounds.shared_memory_all_reduce import avoid_shared_memory_all_reduce

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
# A rank that has connected and is gone again is noticed after these; one that has not appeared yet
# may start minutes later.
CONNECT_SECONDS = 60.0
# The watchdog of this process, from connect() to disconnect(); a process has one default group.
_watchdogs: list[Watchdog] = []


@dataclass(frozen=True)
class Topology:
    """This process's rank, and collectives over all ranks.

    Expert-parallel groups are ``ep_size`` neighbouring ranks, as DeepSpeed builds them, and so are
    the ranks that share the sequences of a micro batch: ``sp_size`` times ``tp_size`` neighbours
    that share tensors.
    """

    rank: int
    world_size: int
    ep_size: int
    device: torch.device
    sp_size: int = 1
    tp_size: int = 1

    @property
    def token_parts(self) -> int:
        """How many ranks share each sequence."""
        return self.sp_size * self.tp_size

    @property
    def token_part(self) -> int:
        """Which part of its sequences' tokens this rank computes, from 0."""
        return self.rank % self.token_parts

    @property
    def dp_size(self) -> int:
        """How many micro batches are computed at the same time."""
        return self.world_size // self.token_parts

    @property
    def dp_rank(self) -> int:
        """Which of them this rank computes, whole or a part of its tokens."""
        return self.rank // self.token_parts

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

    def own_group(self, groups: Sequence[Sequence[int]]) -> distributed.ProcessGroup | None:
        """Create a group per list of ranks, and return this rank's; None for groups of one rank.

        Every rank must call it.
        """
        if len(groups[0]) == 1:
            return None
        # torch wants every rank to create every group, in the same order, also those without it.
        created = [distributed.new_group(list(ranks)) for ranks in groups]
        pairs = zip(created, groups, strict=True)
        return next(group for group, ranks in pairs if self.rank in ranks)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            distributed.barrier()


def free_port() -> int:
    """A loopback port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _own_address(others: list[str]) -> str:
    """Return an address of this host for ranks on others; empty if there is none."""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        # Debian and its kin give a host's own name a loopback address.
        if not is_loopback(address):
            return address
    for other in others:
        with contextlib.suppress(OSError):
            address = address_towards(other)
            if not is_loopback(address):
                return address
    return outward_address() or ""


def _from_mpi() -> dict[str, str]:
    # An optional package, and importing it starts MPI.
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    # On one machine the loopback always works; a host name may not resolve.
    on_one_machine = node.size == world.size
    own = socket.gethostname()
    others = sorted({name for name in world.allgather(own) if name != own})
    own_address = "127.0.0.1" if on_one_machine else _own_address(others)
    # Rank 0 listens: its address and port are everyone's.
    address, port = world.bcast((own_address, free_port()), root=0)
    address = os.environ.get("MASTER_ADDR", address)
    if not address:
        raise ConfigError(
            "rank 0 finds no address of its host that the other hosts could reach: set MASTER_ADDR"
        )
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(node.rank),
        "LOCAL_WORLD_SIZE": str(node.size),
        "MASTER_ADDR": address,
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


def connect(
    ep_size: int,
    timeout_seconds: float = 300.0,
    connect_seconds: float = CONNECT_SECONDS,
    sp_size: int = 1,
    tp_size: int = 1,
) -> Topology:
    """Join all processes into torch's default group, and choose this process's device.

    From here to :func:`disconnect` a watchdog ends this process with exit code 7 if another rank
    is lost.

    Args:
        timeout_seconds: of silence, after which a rank is lost; a minute at least until
            :func:`rely_on_watchdog` is called.
        connect_seconds: the same, until all ranks are connected.

    Raises:
        ConfigError: if the network interface cannot be found.
        PeerLostError: if rank 0 cannot be reached, or a rank never appears.
    """
    os.environ.update(discover(os.environ))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator = get_accelerator()
    has_gpus = accelerator.device_name() != "cpu"
    if has_gpus:
        # Before any allocation: every rank of a node would otherwise start a context on GPU 0.
        accelerator.set_device(local_rank)
    else:
        keep_kernels()
    # Before init_distributed, which would compile the operation.
    avoid_shared_memory_all_reduce()
    if not distributed.is_initialized():
        os.environ.update(choose_interface(os.environ, has_gpus))
        _start_watchdog(min(connect_seconds, timeout_seconds))
        _join()
        for watchdog in _watchdogs:
            # Loading libraries and building the model hold Python's lock for seconds, in which no
            # thread of this process gives a sign of life.
            watchdog.set_limit(max(timeout_seconds, CONNECT_SECONDS))
            wait_long_in_all_groups()
    return Topology(
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
        ep_size=ep_size,
        device=torch.device(accelerator.current_device_name()),
        sp_size=sp_size,
        tp_size=tp_size,
    )


def _start_watchdog(limit: float) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size == 1:
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        wait_for_host(host, port, limit)
    opener = store_opener(os.environ, limit)
    watchdog = Watchdog(opener, rank, world_size, socket.gethostname(), ACTIVITY, limit)
    _watchdogs[:] = [watchdog]
    watchdog.start()


def _join() -> None:
    is_alone = os.environ["WORLD_SIZE"] == "1"
    with ACTIVITY.pause("connecting"):
        for last in (not is_alone, True):
            try:
                # discover() has set all variables, so DeepSpeed must not look for an MPI launcher.
                deepspeed.init_distributed(
                    auto_mpi_discovery=False, verbose=False, timeout=RENDEZVOUS_TIMEOUT
                )
                return
            except RuntimeError as error:
                if not is_peer_loss(error):
                    raise
                if last:
                    end_without_peer(error)
            # Another process of this machine may have taken the port since it was found free.
            os.environ["MASTER_PORT"] = str(free_port())


def rely_on_watchdog(timeout_seconds: float) -> None:
    """Apply the limit of a run that takes steps: call it once the engine is built.

    From here on no collective gives up on a rank that is alive; the watchdog decides.
    """
    for watchdog in _watchdogs:
        watchdog.set_limit(timeout_seconds)
        wait_long_in_all_groups()


def end_without_peer(error: RuntimeError) -> NoReturn:
    """End this process with exit code 7 after the network has reported a lost rank.

    Raises:
        PeerLostError: if there is no watchdog, which would end the process.
    """
    # Before there is a log, its records go to the terminal, where one sentence is enough.
    if has_log():
        logger.error("another rank is gone", exc_info=error)
    for watchdog in _watchdogs:
        watchdog.end_after_loss()
    write_stacks("another rank is gone")
    raise PeerLostError(f"another rank has ended or cannot be reached; {RUN_AGAIN}") from None


def leave(how: str = "done") -> None:
    """Stop the watchdog, because this rank ends; the other ranks get to know how.

    Args:
        how: "done", or the sentence of the error that ends this rank.
    """
    for watchdog in _watchdogs:
        watchdog.leave(how)
    _watchdogs.clear()


def disconnect() -> None:
    """Leave the process group, so that no process keeps waiting."""
    leave()
    if distributed.is_initialized():
        distributed.destroy_process_group()
