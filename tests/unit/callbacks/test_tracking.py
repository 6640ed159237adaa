"""What a tracker gets to know of a run's end, and how long the run waits for it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pretrain.callbacks import tracking
from pretrain.callbacks.base import Summary
from pretrain.callbacks.events import Events
from pretrain.callbacks.trackers.comet import CometTracker
from pretrain.callbacks.tracking import Status, TrackedRun, Tracker, Tracking


class Remembering(Tracker):
    """Keeps what it receives; its end waits until it may continue."""

    kind = "remembering"

    def __init__(self) -> None:
        self.statuses: list[Status] = []
        self.may_end = threading.Event()

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        return "an-id"

    def log(self, events: Events, step: int) -> None: ...

    def finish(self, status: Status, summary: Summary, files: Sequence[Path]) -> None:
        self.statuses.append(status)
        self.may_end.wait(30)


@pytest.fixture
def tracker() -> Remembering:
    return Remembering()


@pytest.fixture
def callback(tracker: Remembering, tmp_path: Path) -> Tracking:
    run = TrackedRun(tmp_path, project="p", name="n", group=None, tags=[], config={})
    made = Tracking(tracker, run, [], tmp_path / "checkpoints")
    made.on_start(0, 100)
    return made


@pytest.mark.parametrize(
    "last,early,status", [(100, False, "finished"), (30, True, "finished"), (30, False, "stopped")]
)
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
    tracker: Remembering,
    callback: Tracking,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tracking, "STOP_SECONDS", 0.1)
    started = time.monotonic()
    callback.on_end({})
    assert time.monotonic() - started < 10 and "has not answered for" in capsys.readouterr().err
    tracker.may_end.set()


def test_a_resumed_run_never_writes_over_comets_archive_of_the_start_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comet_ml  # noqa: F401 - which draws random numbers too

    monkeypatch.setenv("COMET_START_ONLINE", "0")
    run, first, second = (
        TrackedRun(tmp_path, project="p", name="n", group=None, tags=[], config={}),
        CometTracker(),
        CometTracker(),
    )
    saved = random.getstate()  # by a checkpoint, while the tracker still starts in its thread
    key = first.start(run, None)
    first.finish("stopped", {}, [])
    random.setstate(saved)
    assert second.start(run, key) == key
    second.finish("finished", {}, [])
    assert len(list(tmp_path.rglob("*.zip"))) == 2


SILENT_SERVER = """
import os, socket, sys
from pathlib import Path
import psutil
from pretrain.callbacks import tracking
from pretrain.callbacks.trackers.wandb import WandbTracker
server = socket.create_server(("127.0.0.1", 0))
os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:%d" % server.getsockname()[1]
tracking.STOP_SECONDS = 2.0
callback = tracking.Tracking(WandbTracker(), tracking.TrackedRun(Path(sys.argv[1]), "p", "n", None, [], {}), [], Path(sys.argv[1]) / "checkpoints")
callback.on_start(0, 2)
callback.on_end({})
print([child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE])
"""


@pytest.mark.full
def test_a_stopped_run_ends_although_wandb_still_waits_for_its_server(tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    variables |= {"WANDB_API_KEY": "c0ffee01" * 5, "HOME": str(tmp_path)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SILENT_SERVER, str(tmp_path)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert (
        done.stdout.splitlines()[-1] == "[]" and time.monotonic() - started < 45
    )  # its own process would try for a minute, and Python's end would wait for it
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.startswith("warning: the tracker wandb has not answered for 2 s")
