"""Real signals to real runs of two ranks: what is saved, which exit code arrives, and that the end
is bitwise the same.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.core.errors import PEER_LOST, PREEMPTED
from tests.support.paths import LAUNCHERS
from tests.support.tiny_run import Started, Tiny, curve, start_ranks, wait_for_step

Command = Callable[[list[str]], tuple[int, str]]
STEPS = 45


def arguments_for(tiny: Tiny, run: Path) -> list[str]:
    intervals = (
        "checkpoint.interval_steps=10",
        "validation.interval_steps=10",
        "logging.interval_steps=3",
    )
    return tiny.arguments(run, "parallel.ep_size=2", *intervals, steps=STEPS)


def start(script: str, tiny: Tiny, run: Path) -> Started:
    return Started([LAUNCHERS / script, *arguments_for(tiny, run)], run.parent)


def saved_step(run: Path) -> int:
    return int((run / "checkpoints" / "latest").read_text().removeprefix("step_"))


@pytest.fixture(scope="module")
def uninterrupted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    started = start("run_mpi.sh", tiny, run)
    assert started.wait() == 0, started.stderr
    return run


def test_signals_to_the_launcher_to_one_rank_and_a_kill_leave_the_curve_bitwise_the_same(
    tiny: Tiny, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    to_launcher = start("run_deepspeed.sh", tiny, run)
    wait_for_step(run, 6, to_launcher)
    to_launcher.process.send_signal(signal.SIGTERM)
    assert to_launcher.wait() == PREEMPTED, to_launcher.stderr
    assert "stopped and saved at step" in to_launcher.stdout
    first = saved_step(run)
    assert first >= 6
    assert to_launcher.survivors() == []

    to_one_rank = start("run_torchrun.sh", tiny, run)
    wait_for_step(run, first + 5, to_one_rank)
    to_one_rank.rank(1).send_signal(signal.SIGTERM)
    assert to_one_rank.wait() == PREEMPTED, to_one_rank.stderr
    second = saved_step(run)
    assert second >= first + 5
    assert to_one_rank.survivors() == []

    survivor, victim = start_ranks(arguments_for(tiny, run), run.parent)
    wait_for_step(run, second // 10 * 10 + 12, survivor)
    victim.process.kill()
    assert survivor.wait() == PEER_LOST
    assert (
        "stopped, ended or cannot be reached since" in survivor.stderr
        and "Traceback" not in survivor.stderr
    )
    assert second < saved_step(run) < STEPS

    finished = start("run_mpi.sh", tiny, run)
    assert finished.wait() == 0, finished.stderr
    assert curve(run) == curve(uninterrupted)
