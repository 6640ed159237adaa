"""A rank that is slowed down while it works is named; two equal ranks are not."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import distributed

from pretrain.engine.topology import free_port
from pretrain.training.slow_ranks import COLLECTIVES, RankTime, slow_ranks
from tests.support.paths import LAUNCHERS
from tests.support.tiny_run import Started, Tiny, wait_for_step

# For three quarters of the time.
STOPPED_SECONDS = 0.03
RUNNING_SECONDS = 0.01


def slow_down(process: psutil.Process, until: threading.Event) -> None:
    """Stops and continues a process again and again, as a machine that is short of cores does."""
    while not until.is_set():
        process.suspend()
        time.sleep(STOPPED_SECONDS)
        process.resume()
        time.sleep(RUNNING_SECONDS)


WORKER = """\
import json, os, sys, time
import torch
from torch import distributed
from pretrain.engine.topology import Topology
from pretrain.training.slow_ranks import OwnTime

rank = int(os.environ["RANK"])
distributed.init_process_group("gloo")
names = ("allreduce", "alltoall_base", "barrier")
before = {name: vars(distributed.ProcessGroup)[name] for name in names}
own_time = OwnTime(Topology(rank, 2, 1, torch.device("cpu")), 10)
two, four = torch.ones(2), torch.ones(4)
kinds = (
    lambda: distributed.all_reduce(four),
    lambda: distributed.all_reduce(four, async_op=True).wait(),
    lambda: distributed.all_to_all_single(torch.empty(4), four),
    lambda: distributed.all_gather_into_tensor(torch.empty(4), two),
    lambda: distributed.reduce_scatter_tensor(torch.empty(2), four),
    lambda: distributed.all_gather([torch.empty(2), torch.empty(2)], two),
    lambda: distributed.broadcast(four, 0),
)
rounds = []
waited = []
for slower in (1, 5):
    for step in range(1, 11):
        with own_time.step(step):
            for _ in range(3):
                time.sleep(0.03 * (slower if rank == 1 else 1))
                # Each kind comes first in some round: it is the one that waits.
                kinds[len(waited) % len(kinds)]()
                waited.append(step)
                for kind in kinds:
                    kind()
            distributed.barrier()
    rounds.append([vars(time) for time in own_time.gather()])
assert own_time.gather() is None
assert all(vars(distributed.ProcessGroup)[name] is method for name, method in before.items())
tensor = torch.ones(1)
distributed.all_reduce(tensor)
assert tensor.item() == 2.0
if rank == 0:
    print(json.dumps(rounds))
distributed.destroy_process_group()
"""


def test_every_collective_of_this_torch_is_timed() -> None:
    kinds = re.compile(r"^_?(all|barrier|broadcast|gather|monitored|reduce|scatter)")
    found = {name for name in vars(distributed.ProcessGroup) if kinds.match(name)}
    assert len(found) > 10 and found <= set(COLLECTIVES)


def test_waiting_for_a_slow_rank_is_no_work(tmp_path: Path) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        Started([sys.executable, "-c", WORKER], tmp_path, shared | {"RANK": str(rank)})
        for rank in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
    rounds = [
        [RankTime(**time) for time in times]
        for times in json.loads(ranks[0].stdout.splitlines()[-1])
    ]
    equal, slowed = rounds
    assert slow_ranks(equal) == {}
    # Rank 0 waits as long as rank 1 works, and that is left out.
    assert slow_ranks(slowed).keys() == {1}, slowed
    assert slowed[0].seconds < 2 * equal[0].seconds


@pytest.mark.full
def test_the_slowed_one_of_two_ranks_is_named(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    quiet = ("checkpoint.interval_steps=100", "validation.interval_steps=100")
    arguments = tiny.arguments(run, "parallel.ep_size=2", *quiet, steps=60)
    started = Started([LAUNCHERS / "run_deepspeed.sh", *arguments], tmp_path)
    wait_for_step(run, 31, started)
    ended = threading.Event()
    slower = threading.Thread(target=slow_down, args=(started.rank(1), ended))
    slower.start()
    wait_for_step(run, 51, started)
    ended.set()
    slower.join()
    assert started.wait() == 0, started.stderr

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timing: dict[int, dict[str, Any]] = {
        line["step"]: line for line in lines if line["kind"] == "timing"
    }
    measured = {step: line["rank_seconds"] for step, line in timing.items()}
    # The first ten steps hold what each rank allocates and compiles once.
    assert [timing[step]["slow_ranks"] for step in (20, 30)] == [{}, {}], measured
    assert timing[50]["slow_ranks"].keys() == {"1"}, measured
    factor = timing[50]["slow_ranks"]["1"]
    assert factor == timing[50]["slowest_over_median"] > 1.5
    log = (run / "log.txt").read_text()
    assert f"rank 1 (host {socket.gethostname()}) takes {factor:.1f} times the median" in log
    assert "rank 0 (host" not in log
