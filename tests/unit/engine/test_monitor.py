"""DeepSpeed's monitor sections, one by one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

from pretrain.callbacks.deepspeed_monitor import DeepSpeedMonitor
from pretrain.callbacks.trackers.wandb import WandbTracker
from pretrain.callbacks.tracking import TrackedRun, Tracking
from pretrain.engine.monitor import TRAIN_LOSS, Monitor, without_monitors


@pytest.fixture(autouse=True)
def rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitors ask DeepSpeed for the rank, which has no processes here."""
    import deepspeed.comm

    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)


def csv_section(folder: Path) -> dict[str, Any]:
    return {
        "csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "job"},
        "train_batch_size": 8,
    }


def test_the_engine_gets_the_config_without_them(tmp_path: Path) -> None:
    assert without_monitors(csv_section(tmp_path)) == {"train_batch_size": 8}


def test_nothing_is_enabled_without_a_section_and_on_other_ranks(tmp_path: Path) -> None:
    assert not Monitor({"csv_monitor": {"enabled": False}}, writes=True, samples=lambda: 0).enabled
    assert not Monitor(csv_section(tmp_path), writes=False, samples=lambda: 0).enabled
    assert list(tmp_path.iterdir()) == []
    assert Monitor(csv_section(tmp_path), writes=True, samples=lambda: 0).enabled


def test_a_backend_that_fails_is_told_once_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A file stands where TensorBoard's folder would be.
    (tmp_path / "taken").touch()
    broken = {
        "tensorboard": {"enabled": True, "output_path": str(tmp_path / "taken"), "job_name": "job"}
    }
    monitor = Monitor(csv_section(tmp_path) | broken, writes=True, samples=lambda: 0)
    assert monitor.enabled and monitor.summary_writer is None
    monitor.write_events([("Train/Samples/lr", 0.1, 8)])
    monitor.write_record([("train/loss", 2.0)], 1)
    assert (tmp_path / "job" / "train_loss.csv").read_text().split() == ["step,loss", "1,2.0"]
    assert (tmp_path / "job" / "Train_Samples_lr.csv").read_text().split() == ["step,lr", "8,0.1"]
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert sentence.startswith("warning: the ds_config's 'tensorboard' failed (NotADirectoryError")


def test_tensorboard_shows_each_step_once_behind_a_rollback_and_a_resume(tmp_path: Path) -> None:
    section = {
        "tensorboard": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"},
    }

    def train(monitor: Monitor, start: int, stop: int, value: float) -> None:
        callback = DeepSpeedMonitor(monitor)
        callback.on_rollback(start)
        for step in range(start + 10, stop + 1, 10):
            monitor.write_events([("Train/Samples/lr", value, 8 * step)])
            callback.on_record({"kind": "train", "step": step, "loss": value})
            callback.on_record({"kind": "validation", "step": step, "validation_loss": value})

    first = Monitor(section, writes=True, samples=lambda: 0)
    train(first, 0, 50, 1.0)
    train(first, 20, 40, 2.0)
    time.sleep(1.1)  # TensorBoard puts files in the order of the seconds in their names
    train(Monitor(section, writes=True, samples=lambda: 0), 30, 50, 3.0)
    values = {10: 1.0, 20: 1.0, 30: 2.0, 40: 3.0, 50: 3.0}
    for folder in ("job", "job/validation"):
        scripts = event_accumulator.EventAccumulator(str(tmp_path / folder)).Reload()
        assert scripts.Tags()["scalars"] == [TRAIN_LOSS]
        shown = [(event.step, event.value) for event in scripts.Scalars(TRAIN_LOSS)]
        assert shown == list(values.items())
        pages = plugin_event_accumulator.EventAccumulator(str(tmp_path / folder)).Reload()
        drawn = [
            (event.step, event.tensor_proto.float_val[0]) for event in pages.Tensors(TRAIN_LOSS)
        ]
        assert drawn == list(values.items())


@pytest.fixture
def without_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SILENT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "nobody"))
    wandb.teardown()  # it reads the environment once a process
    yield
    wandb.teardown()


def test_wandb_without_a_key_asks_nothing_on_a_terminal(
    tmp_path: Path, without_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    person, place = os.openpty()
    os.write(person, b"3\n" * 9)  # what it may read
    with (
        monkeypatch.context() as patch,
        open(place, "w", buffering=1) as errors,
        open(place, closefd=False) as answers,
    ):
        patch.setattr(sys, "stdin", answers)
        patch.setattr(sys, "stderr", errors)
        Monitor({"wandb": {"enabled": True, "project": "p"}}, writes=True, samples=lambda: 0)
        tracking = Tracking(
            WandbTracker(),
            TrackedRun(tmp_path, project="p", name="n", group=None, tags=[], config={}),
            [],
            tmp_path / "checkpoints",
        )
        tracking.on_start(0, 1)
        tracking.on_end({})
        os.write(place, b"the end")
        shown = ""
        while not shown.endswith("the end"):
            shown += os.read(person, 1 << 16).decode()
    os.close(person)
    assert "Enter your choice" not in shown
    for who in ("the ds_config's 'wandb'", "the tracker wandb"):
        assert f"warning: {who} failed (UsageError: No API key" in shown
