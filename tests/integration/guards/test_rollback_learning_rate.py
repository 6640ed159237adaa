"""What a rollback does to the learning rate: from there on, on every rank, and after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.checkpoint.layout import complete_checkpoints, read_state
from tests.support.fault_injection import Injection, poison_batches
from tests.support.tiny_run import Tiny, curve, make_trainer, start_ranks

PEAK = 3.0e-3
SMALL = ("model.num_hidden_layers=1", "validation.interval_steps=100", "schedule.warmup_steps=0")
BACK = ("guards.non_finite.action=rollback", "guards.rollback.skip_steps=0")
HALVED = "guards.rollback.learning_rate_factor=0.5"


def rates(run: Path) -> dict[int, float]:
    """The recorded learning rate / peak of each step."""
    rows = [row for row in curve(run) if row["kind"] == "train"]
    return {row["step"]: round(row["learning_rate"] / PEAK, 9) for row in rows}


def run_ranks(tiny: Tiny, run: Path, ranks: int, *settings: str, steps: int, fault: str) -> str:
    arguments = tiny.arguments(run, *SMALL, *BACK, *settings, steps=steps)
    started = start_ranks(arguments, run.parent, {"FAULT": fault} if fault else {}, ranks)
    codes = [process.wait() for process in started]
    assert codes == [0] * ranks, [process.stderr for process in started]
    return started[0].stderr


# Passes of the loss that becomes NaN: in step 5, which has four micro batches over all ranks.
@pytest.mark.parametrize(
    ("ranks", "fault"), [(1, "nan@step.backward:18"), (2, "nan@step.backward:9:1")]
)
def test_the_rate_falls_at_the_rollback_and_stays_so_after_a_resume_on_other_ranks(
    ranks: int, fault: str, tiny: Tiny, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shown = run_ranks(tiny, run, ranks, HALVED, steps=7, fault=fault)
    assert "went back to the checkpoint of step 3; the learning rate is 0.5 of its" in shown
    assert rates(run) == {step: 1.0 if step < 4 else 0.5 for step in range(1, 8)}
    rows = {row["step"]: row for row in curve(run) if row["kind"] == "train"}
    assert "learning_rate_factor" not in rows[3] and rows[4]["learning_rate_factor"] == 0.5
    newest = complete_checkpoints(run / "checkpoints")[0]
    assert read_state(newest)["progress"]["learning_rate_factor"] == 0.5
    run_ranks(tiny, run, 3 - ranks, HALVED, steps=9, fault="")
    assert rates(run)[9] == 0.5 and len(rates(run)) == 9
    # The recipe's factor is of later rollbacks: without it the run still keeps that of its past.
    run_ranks(tiny, run, 1, steps=10, fault="")
    assert rates(run)[10] == 0.5


@pytest.mark.usefixtures("in_process")
def test_rollbacks_multiply_also_when_both_go_back_to_one_checkpoint(
    tiny: Tiny, tmp_path: Path
) -> None:
    settings = (*SMALL, *BACK, HALVED, "checkpoint.interval_steps=2")
    trainer = make_trainer(tiny, tmp_path, *settings, zero=1, steps=5)
    poison_batches(trainer, Injection(trainer.engine, 0, 0, "loss"), {3, 5})
    assert trainer.fit() and trainer.progress.rollbacks == 2
    assert trainer.progress.learning_rate_factor == 0.25
    assert rates(tmp_path) == {1: 1.0, 2: 1.0, 3: 0.25, 4: 0.25, 5: 0.25}


@pytest.mark.usefixtures("in_process")
def test_without_a_factor_a_rollback_leaves_the_rate_alone(tiny: Tiny, tmp_path: Path) -> None:
    settings = (*SMALL, *BACK, "checkpoint.interval_steps=2")
    trainer = make_trainer(tiny, tmp_path, *settings, zero=1, steps=5)
    poison_batches(trainer, Injection(trainer.engine, 0, 0, "loss"), {3})
    assert trainer.fit() and trainer.progress.rollbacks == 1
    assert set(rates(tmp_path).values()) == {1.0} and len(rates(tmp_path)) == 5
    assert all("learning_rate_factor" not in row for row in curve(tmp_path))
