"""DeepSpeed's monitor sections, one by one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.callbacks.trackers.wandb import WandbTracker
from pretrain.callbacks.tracking import TrackedRun, Tracking
from pretrain.engine.monitor import Monitor, without_monitors


@pytest.fixture(autouse=True)
def rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitors ask DeepSpeed for the rank, which has no processes here."""
    import deepspeed.comm

    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)


def csv_section(folder: Path) -> dict[str, Any]:
    return {"csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "job"}, "train_batch_size": 8}


def test_the_engine_gets_the_config_without_them(tmp_path: Path) -> None:
    assert without_monitors(csv_section(tmp_path)) == {"train_batch_size": 8}


def test_nothing_is_enabled_without_a_section_and_on_other_ranks(tmp_path: Path) -> None:
    assert not Monitor({"csv_monitor": {"enabled": False}}, writes=True, samples=lambda: 0).enabled
    assert not Monitor(csv_section(tmp_path), writes=False, samples=lambda: 0).enabled
    assert list(tmp_path.iterdir()) == []
    assert Monitor(csv_section(tmp_path), writes=True, samples=lambda: 0).enabled


def test_a_backend_that_fails_is_told_once_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A file stands where TensorBoard's folder would be.
    (tmp_path / "taken").touch()
    broken = {"tensorboard": {"enabled": True, "output_path": str(tmp_path / "taken"), "job_name": "job"}}
    monitor = Monitor(csv_section(tmp_path) | broken, writes=True, samples=lambda: 0)
    assert monitor.enabled and monitor.summary_writer is None
    monitor.write_events([("Train/Samples/lr", 0.1, 8)])
    monitor.write_row([("train/loss", 2.0)], 1)
    assert (tmp_path / "job" / "train_loss.csv").read_text().split() == ["step,loss", "1,2.0"]
    assert (tmp_path / "job" / "Train_Samples_lr.csv").read_text().split() == ["step,lr", "8,0.1"]
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert sentence.startswith("warning: the ds_config's 'tensorboard' failed (NotADirectoryError")


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


def test_wandb_without_a_key_asks_nothing_on_a_terminal(tmp_path: Path, without_key: None, monkeypatch: pytest.MonkeyPatch) -> None:
    person, place = os.openpty()
    os.write(person, b"3\n" * 9)  # the answers to what it might ask
    with monkeypatch.context() as patch, open(place, "w", buffering=1) as errors, open(place, closefd=False) as answers:
        patch.setattr(sys, "stdin", answers)
        patch.setattr(sys, "stderr", errors)
        Monitor({"wandb": {"enabled": True, "project": "p"}}, writes=True, samples=lambda: 0)
        tracking = Tracking(WandbTracker(), TrackedRun(tmp_path, project="p", name="n", group=None, tags=[], config={}), [])
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
