"""How ranks on several hosts find each other: the network interface, and rank 0's address."""

from __future__ import annotations

import ipaddress
import logging
import socket
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import psutil
from torch.distributed import PrefixStore, TCPStore

from pretrain.core.errors import ConfigError, PeerLostError
from pretrain.engine.watchdog import Store

logger = logging.getLogger(__name__)

# Nodes of a large job may start minutes apart.
RENDEZVOUS_TIMEOUT = timedelta(minutes=30)
# Nothing is sent to it: an address for documentation, outside of every cluster, so that the kernel
# picks the interface of the default route.
ELSEWHERE = "192.0.2.1"
PROBE_SECONDS = 5.0
RETRY_SECONDS = 0.5


def spans_hosts(environment: Mapping[str, str]) -> bool:
    """Whether the launcher has started ranks on several hosts, as far as it says."""
    local = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
    if local:
        return int(local) < int(environment["WORLD_SIZE"])
    return int(environment.get("SLURM_NNODES", "1")) > 1


def address_towards(host: str, port: int = 9) -> str:
    """Return the address of this host from which packets to another one would leave.

    Raises:
        OSError: if the name does not resolve, or there is no route.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        # Without a packet: connecting a datagram socket only chooses the route.
        probe.connect(target)
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    """Whether an address only reaches this host itself."""
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def interface_of(address: str) -> str | None:
    """Return the name of the network interface with an address; None if none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in addresses):
            return name
    return None


def outward_address() -> str | None:
    """Return this host's address for others: of the default route, or of its only interface."""
    try:
        return address_towards(ELSEWHERE)
    except OSError:
        pass
    status = psutil.net_if_stats()
    found = [
        entry.address
        for name, addresses in psutil.net_if_addrs().items()
        for entry in addresses
        if entry.family == socket.AF_INET
        and not is_loopback(entry.address)
        and name in status
        and status[name].isup
    ]
    return found[0] if len(found) == 1 else None


def choose_interface(environment: Mapping[str, str], has_gpus: bool) -> dict[str, str]:
    """Return the variables by which gloo (and NCCL) bind to the interface towards rank 0's host.

    Without them gloo binds to the address that the host's own name has, which is a loopback one
    under Debian and its kin. Nothing is chosen for ranks of one host, or if the user has chosen.

    Raises:
        ConfigError: if the interface cannot be found, or MASTER_ADDR is this host itself although
            rank 0 is on another one.
    """
    if not spans_hosts(environment) or "GLOO_SOCKET_IFNAME" in environment:
        return {}
    master = environment["MASTER_ADDR"]
    try:
        own: str | None = address_towards(master)
    except OSError:
        # Its name may resolve later: the connection itself reports it.
        own = outward_address()
    if own is not None and is_loopback(own):
        local = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or "1")
        if int(environment["RANK"]) >= local:
            raise ConfigError(
                f"MASTER_ADDR ({master}) is a loopback address on rank {environment['RANK']}, "
                "which is not on rank 0's host: set it to an address of rank 0's host that the "
                "other hosts reach"
            )
        own = outward_address()
    name = None if own is None else interface_of(own)
    if name is None:
        raise ConfigError(
            f"rank {environment['RANK']} cannot tell which network interface reaches the other "
            f"hosts (MASTER_ADDR is {master}): set GLOO_SOCKET_IFNAME to its name on each host"
            f"{', and NCCL_SOCKET_IFNAME too' if has_gpus else ''}"
        )
    chosen = {"GLOO_SOCKET_IFNAME": name}
    if has_gpus and "NCCL_SOCKET_IFNAME" not in environment:
        chosen["NCCL_SOCKET_IFNAME"] = name
    return chosen


def wait_for_host(host: str, port: int, limit: float) -> None:
    """Wait until rank 0 listens.

    A host that replies but does not listen yet has not started its rank, which may take as long as
    the rendezvous lasts. One that does not reply at all is lost after ``limit`` seconds.

    Raises:
        PeerLostError: if it is.
    """
    reason: OSError
    began = time.monotonic()
    last_sign = began
    said = False
    while True:
        now = time.monotonic()
        try:
            socket.create_connection((host, port), timeout=min(PROBE_SECONDS, limit)).close()
            return
        except ConnectionRefusedError as error:
            reason = error
            last_sign = time.monotonic()
        except OSError as error:
            reason = error
        said = said or now - began > limit
        if time.monotonic() - last_sign >= limit:
            raise PeerLostError(
                f"rank 0's host {host} (port {port}) cannot be reached for {limit:.0f} s "
                f"({reason.strerror or reason}): check MASTER_ADDR and the network, then run the "
                "same command"
            )
        if now - began > RENDEZVOUS_TIMEOUT.total_seconds():
            raise PeerLostError(
                f"rank 0 has not started on {host} (port {port}) for "
                f"{RENDEZVOUS_TIMEOUT.total_seconds() / 60:.0f} minutes: check its launcher, then "
                "run the same command on all hosts"
            )
        if not said and now - began > limit / 2:
            said = True
            print(f"waiting for rank 0 on {host}, port {port} ({reason})", file=sys.stderr)
        time.sleep(RETRY_SECONDS)


def store_opener(environment: Mapping[str, str], limit: float) -> Callable[[], Store]:
    """Return a function that opens a connection of its own to rank 0's store.

    torch's rendezvous uses the same server: rank 0 starts it, unless torchrun has.

    Args:
        limit: seconds that a call of the store may take, if it notices.
    """
    host = environment["MASTER_ADDR"]
    port = int(environment["MASTER_PORT"])
    serves = (
        environment["RANK"] == "0" and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    )
    # torchrun keeps its store when it starts the ranks again.
    prefix = f"watchdog/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    timeout = timedelta(seconds=limit)
    server: list[TCPStore] = []

    def open_store() -> Store:
        if serves and not server:
            server.append(
                TCPStore(
                    host,
                    port,
                    is_master=True,
                    multi_tenant=True,
                    wait_for_workers=False,
                    timeout=timeout,
                )
            )
            return PrefixStore(prefix, server[0])
        # First by hand: torch's own attempts fill the terminal with stacks of C++.
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
        client = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        return PrefixStore(prefix, client)

    return open_store
