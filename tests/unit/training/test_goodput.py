"""The account of a run's time over starts, rollbacks and lost steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.loading.prefetch import PrefetchWait
from pretrain.guards.progress import Progress
from pretrain.training import goodput
from pretrain.training.goodput import Account, GoodputMeter, read_account
from pretrain.training.timing import StepTimer


class World:
    """A run whose clock and processes the test moves."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.now = 1000.0
        self.created = 1000.0
        monkeypatch.setattr(goodput.time, "time", lambda: self.now)
        monkeypatch.setattr(
            goodput.psutil,
            "Process",
            lambda: type("P", (), {"create_time": lambda _: self.created})(),
        )

    def start(self, progress: Progress, startup: float) -> GoodputMeter:
        self.created = self.now
        self.now += startup
        self.timer = StepTimer()
        self.wait = PrefetchWait()
        meter = GoodputMeter(self.folder, self.timer, self.wait)
        meter.begin(progress)
        return meter

    def steps(
        self, meter: GoodputMeter, progress: Progress, count: int, stall: float = 0.0
    ) -> None:
        """Steps of two seconds, each of which waits for its batch first."""
        for _ in range(count):
            self.now += 2.0 + stall
            progress.step += 1
            progress.train_seconds += 2.0 + stall
            self.wait.seconds += stall
            meter.note(progress)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_a_killed_run_counts_lost_steps_stalls_saves_and_the_time_it_was_down(world: World) -> None:
    progress = Progress()
    meter = world.start(progress, startup=10.0)
    world.steps(meter, progress, 5, stall=1.0)
    saved = Progress(**vars(progress))
    world.now += 4.0
    world.timer.pause_seconds["saving"] += 4.0
    meter.note(progress)
    world.steps(meter, progress, 3, stall=1.0)
    world.now += 100.0  # killed, and down

    meter = world.start(saved, startup=20.0)
    world.steps(meter, saved, 5)
    world.now += 6.0
    world.timer.pause_seconds["validation"] += 6.0
    meter.note(saved)
    measured = meter.measure()
    assert measured == {
        "goodput": pytest.approx(20.0 / 174.0),
        "elapsed_seconds": pytest.approx(10 + 15 + 4 + 9 + 100 + 20 + 10 + 6),
        "productive_seconds": pytest.approx(20.0),
        "lost_seconds": pytest.approx(6.0),
        "lost_steps": 3,
        "restarts": 1,
        "data_stall_seconds": pytest.approx(8.0),
        "saving_seconds": pytest.approx(4.0),
        "saving_share": pytest.approx(4.0 / 174.0),
        "validation_seconds": pytest.approx(6.0),
        "startup_seconds": pytest.approx(30.0),
        "down_seconds": pytest.approx(100.0),
    }
    # A start with nothing to do reports the same.
    idle = GoodputMeter(world.folder, StepTimer(), PrefetchWait())
    assert idle.measure() == measured


def test_a_start_that_takes_no_step_loses_nothing_twice(world: World) -> None:
    progress = Progress()
    world.steps(world.start(progress, 1.0), progress, 4)
    world.start(Progress(), 1.0)
    meter = world.start(Progress(), 1.0)
    measured = meter.measure()
    assert measured is not None
    assert (measured["lost_steps"], measured["restarts"]) == (4, 2)


@pytest.mark.parametrize("is_killed", [False, True])
def test_steps_that_a_guard_rolled_back_are_lost_once(world: World, is_killed: bool) -> None:
    progress = Progress()
    meter = world.start(progress, 0.0)
    world.steps(meter, progress, 6)
    back = Progress(step=2, train_seconds=4.0)
    back.take_over_counts(progress, 1.0)
    world.steps(meter, back, 1)
    if is_killed:
        # Step 3 is done again, and the rollback too.
        again = Progress(step=2, train_seconds=4.0)
        meter = world.start(again, 0.0)
    measured = meter.measure()
    assert measured is not None
    assert measured["lost_steps"] == (5 if is_killed else 4)
    assert measured["lost_seconds"] == pytest.approx(10.0 if is_killed else 8.0)
    assert measured["productive_seconds"] == pytest.approx(4.0 if is_killed else 6.0)


def test_training_before_the_first_account_is_no_productive_time(world: World) -> None:
    meter = world.start(Progress(step=9, train_seconds=500.0, stall_seconds=3.0), 5.0)
    measured = meter.measure()
    assert measured is not None
    assert measured["productive_seconds"] == 0.0


@pytest.mark.parametrize("content", ["", "{", '{"time": 3}', "[]"])
def test_a_damaged_account_begins_anew(world: World, content: str) -> None:
    (world.folder / goodput.ACCOUNT).write_text(content)
    progress = Progress()
    meter = world.start(progress, 5.0)
    world.steps(meter, progress, 1)
    account = read_account(world.folder)
    assert isinstance(account, Account) and account.starts == 1 and account.step == 1


def test_other_ranks_keep_no_account_and_count_their_stalls(tmp_path: Path) -> None:
    wait = PrefetchWait()
    meter = GoodputMeter(None, StepTimer(), wait)
    progress = Progress()
    meter.begin(progress)
    wait.seconds = 3.0
    meter.note(progress)
    assert progress.stall_seconds == 3.0 and meter.measure() is None
