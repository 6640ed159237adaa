"""What a tracker is told of a run's end, and how long the run waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pretrain.callbacks import tracking
from pretrain.callbacks.base import Row
from pretrain.callbacks.events import Events
from pretrain.callbacks.tracking import Status, TrackedRun, Tracker, Tracking


class Remembering(Tracker):
    """Keeps what it is told; its end waits until it may go on."""

    kind = "remembering"

    def __init__(self) -> None:
        self.statuses: list[Status] = []
        self.may_end = threading.Event()

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        return "an-id"

    def log(self, events: Events, step: int) -> None: ...

    def finish(self, status: Status, summary: Row, files: Sequence[Path]) -> None:
        self.statuses.append(status)
        self.may_end.wait(30)


@pytest.fixture
def tracker() -> Remembering:
    return Remembering()


@pytest.fixture
def callback(tracker: Remembering, tmp_path: Path) -> Tracking:
    run = TrackedRun(tmp_path, project="p", name="n", group=None, tags=[], config={})
    made = Tracking(tracker, run, [])
    made.on_start(0, 100)
    return made


@pytest.mark.parametrize("last,early,status", [(100, False, "finished"), (30, True, "finished"), (30, False, "stopped")])
def test_a_run_that_ended_early_is_finished_and_one_that_was_stopped_is_not(
    tracker: Remembering, callback: Tracking, last: int, early: bool, status: Status
) -> None:
    tracker.may_end.set()
    callback.on_step(last)
    if early:
        callback.on_early_end(last)
    callback.on_end({})
    assert tracker.statuses == [status]


def test_a_run_that_was_stopped_waits_a_shorter_time(
    tracker: Remembering, callback: Tracking, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "STOP_SECONDS", 0.1)
    started = time.monotonic()
    callback.on_end({})
    assert time.monotonic() - started < 10 and "has not answered for" in capsys.readouterr().err
    tracker.may_end.set()
