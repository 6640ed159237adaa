"""Two network namespaces joined by one cable: two hosts, as far as the network is concerned.

They share files and processes with this machine, and its name resolves to a loopback address in
both, as under Debian.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

PORT = 29500


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class TwoHosts:
    """``names`` of the namespaces, and the ``addresses`` of their ends of the cable."""

    names: tuple[str, str]
    links: tuple[str, str]
    addresses: tuple[str, str]

    def on(self, host: int, command: Sequence[str | Path]) -> list[str | Path]:
        """The command line that runs a command on a host."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def cut(self, silently: bool) -> None:
        """Cut the cable: without a word to anyone, or so that the kernel sees it."""
        if not silently:
            run("ip", "-n", self.names[0], "link", "set", self.links[0], "down")
            return
        for host in range(2):
            # To a card that is not there.
            self._neighbour(host, "replace", "lladdr", "02:00:00:00:00:99", "nud", "permanent")

    def restore(self) -> None:
        """Put the cable back."""
        run("ip", "-n", self.names[0], "link", "set", self.links[0], "up")
        for host in range(2):
            run("ip", "-n", self.names[host], "neigh", "flush", "dev", self.links[host])
            subprocess.run(
                ["ip", "-n", self.names[host], "neigh", "del", self.addresses[1 - host]]
                + ["dev", self.links[host]],
                capture_output=True,
            )

    def _neighbour(self, host: int, *how: str) -> None:
        action, *rest = how
        other = self.addresses[1 - host]
        run("ip", "-n", self.names[host], "neigh", action, other, "dev", self.links[host], *rest)


def make_two_hosts() -> Iterator[TwoHosts]:
    """Make them, and remove them at the end; skips the test if this process may not."""
    if not all(map(shutil.which, ("ip", "unshare"))):
        pytest.skip("needs the programs ip and unshare")
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make network namespaces (root)")
    mark = f"{os.getpid() % 100_000}"
    names = (f"host-a-{mark}", f"host-b-{mark}")
    links = (f"cable-a{mark}", f"cable-b{mark}")
    addresses = ("10.77.0.1", "10.77.0.2")
    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", links[0], "netns", names[0], "type", "veth",
            "peer", "name", links[1], "netns", names[1])  # fmt: skip
        for name, link, address in zip(names, links, addresses, strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", link)
            run("ip", "-n", name, "link", "set", link, "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield TwoHosts(names, links, addresses)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
