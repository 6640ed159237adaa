"""Two hosts train together by each launcher; the cable between them is cut, and put back."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pretrain.core.errors import PEER_LOST
from tests.support.paths import LAUNCHERS
from tests.support.tiny_run import SCRIPT, Started, Tiny, curve, wait_for_step
from tests.support.two_hosts import PORT, TwoHosts, make_two_hosts

pytestmark = pytest.mark.full
TIMEOUT = 5
MARGIN = 5
STEPS = 160
STARTED: list[Started] = []
# Like ssh, for mpirun: options, then the host, then the command.
REMOTE_SHELL = """\
#!/usr/bin/env bash
while [[ "$1" == -* ]]; do shift; done
case "$1" in {addresses[0]}) name={names[0]} ;; *) name={names[1]} ;; esac
shift
exec ip netns exec "$name" bash -c "$*"
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    yield from make_two_hosts()


@pytest.fixture(scope="module", autouse=True)
def nothing_left(hosts: TwoHosts) -> Iterator[None]:
    """What a failed test has left running ends before the hosts are removed."""
    yield
    for started in STARTED:
        for process in started.alive():
            process.kill()


def start(launcher: str, hosts: TwoHosts, tiny: Tiny, run: Path, steps: int) -> list[Started]:
    """Start the commands of both hosts; one command for mpirun."""
    started = started_by(launcher, hosts, tiny, run, steps)
    STARTED.extend(started)
    return started


def started_by(launcher: str, hosts: TwoHosts, tiny: Tiny, run: Path, steps: int) -> list[Started]:
    folder = run.parent
    settings = (
        "parallel.ep_size=2",
        f"parallel.timeout_seconds={TIMEOUT}",
        "checkpoint.interval_steps=40",
        "validation.interval_steps=50",
    )
    arguments = tiny.arguments(run, *settings, steps=steps)
    variables = {"MASTER_PORT": str(PORT), "MOE_LAUNCHER_SECONDS": "8"}
    if launcher == "mpirun":
        shell = folder / "remote_shell"
        shell.write_text(REMOTE_SHELL.format(addresses=hosts.addresses, names=hosts.names))
        shell.chmod(0o755)
        # As run_mpi.sh does: mpirun alone waits for ever for the host that was cut off.
        command: list[str | Path] = [sys.executable, LAUNCHERS / "supervise.py"]
        command += ["mpirun", "-launcher", "ssh", "-launcher-exec", shell]
        command += ["-hosts", ",".join(hosts.addresses), "-ppn", "1", "-n", "2"]
        return [
            Started(hosts.on(0, [*command, sys.executable, SCRIPT, *arguments]), folder, variables)
        ]
    if launcher == "torchrun":
        variables |= {"NNODES": "2", "MASTER_ADDR": hosts.addresses[0], "RANKS": "1"}
        command = [LAUNCHERS / "run_torchrun.sh", *arguments]
        return [
            Started(hosts.on(host, command), folder, variables | {"NODE_RANK": str(host)})
            for host in range(2)
        ]
    hostfile = folder / "hosts"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
    command = ["deepspeed", "--hostfile", hostfile, "--no_ssh", "--master_addr"]
    command += [hosts.addresses[0], "--master_port", str(PORT), "--node_rank"]
    return [
        Started(hosts.on(host, [*command, str(host), SCRIPT, *arguments]), folder, variables)
        for host in range(2)
    ]


@pytest.fixture(scope="module")
def uninterrupted(hosts: TwoHosts, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    for started in start("torchrun", hosts, tiny, run, STEPS):
        assert started.wait() == 0, started.stderr
    return run


@pytest.mark.parametrize(
    ("launcher", "silently"),
    [("torchrun", True), ("torchrun", False), ("deepspeed", True), ("mpirun", True)],
)
def test_a_cut_cable_ends_both_sides_and_the_same_command_resumes(
    hosts: TwoHosts,
    tiny: Tiny,
    uninterrupted: Path,
    tmp_path: Path,
    launcher: str,
    silently: bool,
) -> None:
    run = tmp_path / "run"
    both = start(launcher, hosts, tiny, run, STEPS)
    try:
        wait_for_step(run, 90, both[0])
        hosts.cut(silently)
        began = time.monotonic()
        ranks = [process for started in both for process in ranks_of(started)]
        assert len(ranks) == 2
        for rank in ranks:
            rank.wait(TIMEOUT + MARGIN + 30)
        assert time.monotonic() - began <= TIMEOUT + MARGIN
        codes = [started.wait() for started in both]
    finally:
        hosts.restore()
    reported = "".join(started.stderr for started in both)
    assert codes == [PEER_LOST] * len(both), reported
    assert "rank 1 (on host" in reported, reported
    assert [process for started in both for process in started.survivors()] == []

    for started in start(launcher, hosts, tiny, run, STEPS):
        assert started.wait() == 0, started.stderr
    assert losses(run) == losses(uninterrupted)


def losses(run: Path) -> list[dict[str, Any]]:
    """What must be equal bit for bit; a window of expert usage begins anew with a resume."""
    return [record for record in curve(run) if record["kind"] != "usage"]


def ranks_of(started: Started) -> list[psutil.Process]:
    return [process for process in started.alive() if is_rank(process)]


def is_rank(process: psutil.Process) -> bool:
    words = process.cmdline()
    return bool(words) and "python" in Path(words[0]).name and str(SCRIPT) in words[1:4]
