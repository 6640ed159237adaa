"""Real kills of supervisors, launchers and ranks: nothing runs on, and no exit code says done."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from pretrain.core.errors import PREEMPTED
from tests.support.paths import LAUNCHERS
from tests.support.tiny_run import Started, Tiny, wait_for_step

SCRIPTS = ("run_deepspeed.sh", "run_torchrun.sh", "run_mpi.sh")
VICTIMS = ("supervisor", "launcher", "parent of the ranks", "rank")
# Of each launcher everything is killed by some test; the quick ones are for what `deepspeed` loses.
QUICK = {("run_deepspeed.sh", victim) for victim in VICTIMS[:3]}
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
