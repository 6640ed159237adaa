"""DeepSpeed's monitor sections, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
