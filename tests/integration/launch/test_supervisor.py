"""Real kills of supervisors, launchers and ranks: nothing runs on, and no exit code says done."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from pretrain.core.errors import PREEMPTED
from tests.support.paths import LAUNCHERS
from tests.support.tiny_run import Started, Tiny, wait_for_step

SCRIPTS = ("run_deepspeed.sh", "run_torchrun.sh", "run_mpi.sh")
VICTIMS = ("supervisor", "launcher", "parent of the ranks", "rank")
# The quick ones are what the deepspeed launcher alone leaves running, and reports as done.
QUICK = {("run_deepspeed.sh", victim) for victim in ("supervisor", "parent of the ranks")}
PAIRS = [
    pytest.param(script, victim, marks=() if (script, victim) in QUICK else pytest.mark.full)
    for script in SCRIPTS
    for victim in VICTIMS
]


def long_run(script: str, tiny: Tiny, run: Path, **variables: str) -> Started:
    """A run of so many steps that only a signal ends it."""
    arguments = tiny.arguments(run, "parallel.ep_size=2", "checkpoint.interval_steps=5", steps=9000)
    return Started([LAUNCHERS / script, *arguments], run.parent, variables)


def victim_of(started: Started, name: str) -> psutil.Process:
    supervisor = psutil.Process(started.process.pid)
    return {
        "supervisor": lambda: supervisor,
        "launcher": lambda: supervisor.children()[0],
        "parent of the ranks": lambda: started.rank(0).parent(),
        "rank": lambda: started.rank(1),
    }[name]()


def saved_step(run: Path) -> int:
    return int((run / "checkpoints" / "latest").read_text().removeprefix("step_"))


@pytest.mark.parametrize(("script", "victim"), PAIRS)
def test_whatever_is_killed_everything_ends_and_nothing_says_done(
    script: str, victim: str, tiny: Tiny, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    started = long_run(script, tiny, run)
    wait_for_step(run, 6, started)
    process = victim_of(started, victim)
    ranks = [started.rank(0), started.rank(1)]
    process.send_signal(signal.SIGKILL)
    code = started.wait()
    assert code not in (0, PREEMPTED), started.stderr
    assert started.survivors() == []
    assert not any(rank.is_running() for rank in ranks)
    # All but the ranks' own death let them save the step that they are at.
    assert saved_step(run) >= (5 if victim == "rank" else 6)


RANK = """\
import os, pathlib, signal, sys, time
from pretrain.core import supervision

supervision.follow_launcher()
stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
pathlib.Path(f"ready-{os.environ['RANK']}").touch()
while not stopped or sys.argv[1] == "hangs":
    time.sleep(0.01)
pathlib.Path(f"saved-{os.environ['RANK']}").touch()
sys.exit(75)
"""
# Like deepspeed, it ignores what happens to its ranks until they end.
LAUNCHER = """\
import os, subprocess, sys
command = [sys.executable, "-P", "pretrain.py", sys.argv[1]]
variables = [{"RANK": str(rank), "CROSS_RANK": "0"} for rank in range(2)]
ranks = [subprocess.Popen(command, env=os.environ | own) for own in variables]
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.mark.parametrize("rank", ["saves", "hangs"])
@pytest.mark.parametrize("victim", ["supervisor", "launcher"])
def test_ranks_save_when_supervisor_or_launcher_dies_and_hanging_ones_are_killed(
    victim: str, rank: str, tmp_path: Path
) -> None:
    (tmp_path / "pretrain.py").write_text(RANK)
    (tmp_path / "launch.py").write_text(LAUNCHER)
    command = [sys.executable, LAUNCHERS / "supervise.py", sys.executable, "launch.py", rank]
    started = Started(command, tmp_path, {"MOE_GRACE_SECONDS": "2"})
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    victim_of(started, victim).kill()
    # Popen and a shell report the end by SIGKILL differently.
    assert started.wait() in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert started.survivors() == []
    assert len(list(tmp_path.glob("saved-*"))) == (2 if rank == "saves" else 0)


RANK_THAT_DIES_ON_A_HOST = """\
import os, signal, sys, time
print("rank", os.environ["PMI_RANK"], "of", os.environ["PMI_SIZE"], flush=True)
if os.environ["PMI_RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(1)
"""


def test_a_host_that_fails_twice_is_left_out(tmp_path: Path) -> None:
    # MPICH starts processes of both "hosts" here if it need not reach them with ssh.
    (tmp_path / "hosts").write_text("localhost:1\n127.0.0.1:1\n")
    (tmp_path / "pretrain.py").write_text(RANK_THAT_DIES_ON_A_HOST)
    supervise = [sys.executable, LAUNCHERS / "supervise.py"]
    mpirun = ["mpirun", "--hostfile", "hosts", "-n", "2", sys.executable, "pretrain.py"]
    variables = {
        "HYDRA_LAUNCHER": "fork",
        "MAX_RESTARTS": "3",
        "RESTART_DELAY_SECONDS": "0.1",
        "TMPDIR": str(tmp_path),
    }
    started = Started([*supervise, *mpirun], tmp_path, variables)
    assert started.wait() == 0, started.stderr
    assert started.stdout.count("rank 1 of 2") == 2 and "rank 0 of 1" in started.stdout
    assert "host 127.0.0.1 has failed 2 times" in started.stderr
    assert started.survivors() == []


def newest_step(run: Path) -> int:
    """The last step whose record was written, independent of the account of goodput."""
    return max(
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()
    )


def test_a_run_whose_ranks_are_killed_twice_starts_again_and_accounts_for_its_time(
    tiny: Tiny, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    intervals = ("checkpoint.interval_steps=6", "validation.interval_steps=12")
    arguments = tiny.arguments(run, "parallel.ep_size=2", *intervals, steps=24)
    created = time.time()
    # Two restarts, each with progress before it: one without would be the whole budget.
    started = Started(
        [LAUNCHERS / "run_deepspeed.sh", *arguments, "--json", "result.json"],
        tmp_path,
        {"MAX_RESTARTS": "1", "RESTART_DELAY_SECONDS": "2"},
    )
    lost = 0
    for step in (8, 15):
        wait_for_step(run, step, started)
        ranks = [started.rank(0), started.rank(1)]
        for rank in ranks:
            rank.suspend()
        lost += newest_step(run) - saved_step(run)
        for rank in ranks:
            rank.kill()
        psutil.wait_procs(ranks, timeout=60)
    assert started.wait() == 0, started.stderr
    elapsed = time.time() - created
    assert started.stderr.count("start 1 of 1 without a new checkpoint follows in 2 s") == 2
    assert started.survivors() == []

    goodput = json.loads((run / "summary.json").read_text())["goodput"]
    assert goodput == json.loads((tmp_path / "result.json").read_text())["goodput"]
    assert goodput["restarts"] == 2
    # A step may have ended whose record was not written yet.
    assert lost <= goodput["lost_steps"] <= lost + 2
    # The launcher's start before the first rank and its end after the last are not the run's.
    assert 0 <= elapsed - goodput["elapsed_seconds"] < 0.5 * elapsed
    assert goodput["down_seconds"] > 4.0
    parts = [value for name, value in goodput.items() if name.endswith("_seconds")]
    assert min(parts) >= 0
    # What is in no part is work between steps.
    assert 0.8 < (sum(parts) - goodput["elapsed_seconds"]) / goodput["elapsed_seconds"] <= 1.0
    assert goodput["goodput"] == goodput["productive_seconds"] / goodput["elapsed_seconds"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "timing"] == [10, 20, 24]
    train = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train] == list(range(1, 25))
    assert goodput["productive_seconds"] <= train[-1]["seconds"]
