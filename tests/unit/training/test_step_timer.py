"""What counts as training time in the records of a run, by a clock that the test sets."""

from __future__ import annotations

import pytest

from pretrain.guards.progress import Progress
from pretrain.training import timing
from pretrain.training.timing import StepTimer


class Clock:
    """In place of the ``time`` module."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_a_window_leaves_out_pauses_and_its_length_stands_still_in_them(clock: Clock) -> None:
    timer = StepTimer()
    timer.start()
    clock.now += 3.0
    with timer.paused("saving"):
        clock.now += 50.0
        assert timer.window_seconds() == 3.0
    clock.now += 2.0
    assert timer.next_window() == 5.0
    clock.now += 1.0
    assert timer.next_window() == 1.0


def test_a_resumed_window_continues_with_what_its_first_steps_took(clock: Clock) -> None:
    timer = StepTimer()
    timer.resume(4.0)
    clock.now += 60.0  # loading
    timer.start()
    clock.now += 2.0
    assert timer.window_seconds() == 6.0


def test_only_steps_are_seconds_of_training(clock: Clock) -> None:
    timer = StepTimer()
    progress = Progress(train_seconds=10.0)
    timer.start()
    with timer.step(progress):
        clock.now += 2.0
    with timer.paused("saving"):
        clock.now += 9.0
    with timer.step(progress):
        clock.now += 1.5
    assert progress.train_seconds == 13.5
