"""Ranks that stop, hang or only take their time: who notices, when, and how the run ends."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore

from pretrain.core.errors import PEER_LOST
from pretrain.engine.topology import free_port
from tests.support.tiny_run import SCRIPT, Started, Tiny, curve, wait_for_step

TIMEOUT = 5
# Between the end of the timeout and the end of the process.
MARGIN = 5
STARTED: list[Started] = []


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A rank that was to end and did not must not run for ever."""
    yield
    for started in STARTED:
        for process in started.alive():
            process.kill()
    STARTED.clear()


def start_ranks(tiny: Tiny, run: Path, steps: int, pauses: list[dict[str, Any]]) -> list[Started]:
    """Two ranks from nothing but their environment, so that no launcher ends the one when the
    other does.
    """
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PAUSES": json.dumps(pauses),
    }
    worker = ["-m", "tests.support.workers.hanging_training"]
    command: list[str | Path] = [sys.executable, *(worker if pauses else [SCRIPT])]
    settings = ("parallel.ep_size=2", f"parallel.timeout_seconds={TIMEOUT}")
    command += tiny.arguments(run, *settings, steps=steps)
    ranks = [
        Started(command, run.parent, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    STARTED.extend(ranks)
    return ranks


def seconds_until_end(process: psutil.Popen | Any, limit: float) -> float:
    began = time.monotonic()
    process.wait(limit)
    return time.monotonic() - began


def sentence(started: Started) -> str:
    assert started.wait() == PEER_LOST, started.stderr
    assert "Traceback" not in started.stderr, started.stderr
    (line,) = [line for line in started.stderr.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.full), 1])
def test_a_stopped_rank_is_named_and_ends_too_once_it_continues(
    tiny: Tiny, tmp_path: Path, stopped: int
) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(tiny, run, 2_000, [])
    wait_for_step(run, 5, ranks[0])
    other, victim = ranks[1 - stopped], ranks[stopped]
    victim.process.send_signal(signal.SIGSTOP)
    took = seconds_until_end(other.process, 60)
    assert TIMEOUT - 1 <= took <= TIMEOUT + MARGIN
    assert f"rank {stopped} " in sentence(other)
    log = (run / "log.txt").read_text()
    assert f"stacks of all threads of rank {1 - stopped}" in log
    assert "trainer.py" in log.split("stacks of all threads")[1]

    victim.process.send_signal(signal.SIGCONT)
    took = seconds_until_end(victim.process, 60)
    assert took <= TIMEOUT + MARGIN
    sentence(victim)


@pytest.mark.parametrize(
    ("rank", "place", "where"),
    [
        (0, "callback", "the records and callbacks of step 3"),
        pytest.param(1, "forward", "step 4", marks=pytest.mark.full),
    ],
)
def test_a_rank_that_is_alive_but_stuck_is_named_with_its_place(
    tiny: Tiny, tmp_path: Path, rank: int, place: str, where: str
) -> None:
    run = tmp_path / "run"
    pause = {"rank": rank, "place": place, "finished": 3, "seconds": 10_000}
    for started in start_ranks(tiny, run, 2_000, [pause]):
        found = sentence(started)
        assert f"rank {rank} " in found and f"it is in {where}" in found, found
        assert "stuck_here" in found, found
    log = (run / "log.txt").read_text()
    assert "stacks of all threads of rank 0" in log
    assert "stacks of all threads of rank 1" in log
    assert "in stuck_here" in log


def test_pauses_longer_than_the_timeout_are_no_hang(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pauses = [
        {"rank": 0, "place": "packing", "seconds": TIMEOUT + 2},
        {"rank": 1, "place": "data", "finished": 1, "seconds": TIMEOUT + 2},
        {"rank": 0, "place": "save", "seconds": TIMEOUT + 2},
        *({"rank": rank, "place": "validation", "seconds": 2} for rank in range(2)),
    ]
    for started in start_ranks(tiny, run, 3, pauses):
        assert started.wait() == 0, started.stderr
    assert curve(run)[-1]["step"] == 3


CONNECTING = """\
from pretrain.core.errors import run_command
from pretrain.engine.topology import connect
run_command(lambda: connect(1, connect_seconds=3) and 0)
"""


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_rank_that_is_lost_while_another_has_not_appeared_yet_is_noticed(
    tmp_path: Path, lost: int
) -> None:
    port = free_port()
    shared = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        Started([sys.executable, "-c", CONNECTING], tmp_path, shared | {"RANK": str(rank)})
        for rank in range(2)
    ]
    STARTED.extend(ranks)
    wait_for_beats(port, 2)
    # Longer than the limit: rank 2 may start much later.
    time.sleep(5)
    assert [started.process.poll() for started in ranks] == [None, None]
    ranks[lost].process.kill()
    took = seconds_until_end(ranks[1 - lost].process, 60)
    assert took <= 3 + MARGIN
    assert f"rank {lost}" in sentence(ranks[1 - lost])


def wait_for_beats(port: int, ranks: int) -> None:
    store = None
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            store = store or TCPStore("127.0.0.1", port, wait_for_workers=False)
            if store.check([f"watchdog/0/beat/{rank}" for rank in range(ranks)]):
                return
        time.sleep(0.2)
    pytest.fail("the ranks do not connect")
