"""Which checkpoints of a run are evaluated, when it goes back, and when it continues."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import pretrain.evaluation.watch
from pretrain.callbacks.card import newest_evaluation
from pretrain.checkpoint.layout import step_of
from pretrain.config.load import load_recipe, recipe_to_yaml
from pretrain.evaluation.report import write_tensorboard
from pretrain.evaluation.watch import Parent, forget_after, read_evaluations, watch

LAST = 60
RECIPE = load_recipe(
    "debug", [f"train.train_tokens={LAST * load_recipe('debug').train.tokens_per_step}"]
)


def save(run: Path, step: int, seed: int = 0, **progress: Any) -> None:
    """A checkpoint as far as it is looked at here."""
    folder = run / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe_to_yaml(RECIPE))
    (folder / "state.json").write_text(json.dumps({"step": step, "progress": progress}))
    (folder / "manifest.json").write_text(json.dumps({"step": step, "seed": seed, **progress}))


class Evaluations:
    """Numbers them, and saves what a training would save meanwhile."""

    def __init__(self, run: Path, *later: int) -> None:
        self.run, self.later, self.steps = run, list(later), list[int]()

    def __call__(self, checkpoint: Path) -> dict[str, Any]:
        self.steps.append(step_of(checkpoint))
        if self.later:
            save(self.run, self.later.pop(0))
        return {"step": step_of(checkpoint), "loss": float(len(self.steps)), "targets": 8}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pretrain.evaluation.watch, "POLL_SECONDS", 0.01)
    return tmp_path / "run"


def test_a_step_that_is_saved_again_is_evaluated_again_in_place_of_the_first(run: Path) -> None:
    for step in (10, 20, LAST):
        save(run, step)
    evaluations = Evaluations(run)
    assert watch(run, evaluations) == 3 and watch(run, evaluations) == 0
    forget_after(run, 10)
    assert [row["step"] for row in read_evaluations(run)] == [10]
    for step in (20, LAST):
        save(run, step, seed=1)
    assert watch(run, evaluations) == 2 and evaluations.steps == [10, 20, LAST] + [20, LAST]
    shown = EventAccumulator(str(run / "tensorboard" / "evaluation"))
    shown.Reload()
    assert [(event.step, event.value) for event in shown.Scalars("evaluation/loss")] == [
        (10, 1.0),
        (20, 4.0),
        (LAST, 5.0),
    ]
    save(run, 10, seed=2)
    assert watch(run, evaluations) == 1
    assert sorted((row["step"], row["loss"]) for row in read_evaluations(run)) == [
        (10, 6.0),
        (20, 4.0),
        (LAST, 5.0),
    ]


def test_evaluations_of_one_second_are_read_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The number at the end of a file's name goes from 9 to 10.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    for step, loss in ((10, 2.0), (20, 1.0)):
        write_tensorboard(
            {"step": step, "loss": loss, "targets": 8}, tmp_path, step, forget_later=True
        )
    shown = EventAccumulator(str(tmp_path))
    shown.Reload()
    assert [(event.step, event.value) for event in shown.Scalars("evaluation/loss")] == [
        (10, 2.0),
        (20, 1.0),
    ]


def test_a_run_that_goes_on_is_watched_to_its_new_end(run: Path) -> None:
    save(run, 10, stopped_early=True)
    save(run, LAST)
    assert watch(run, Evaluations(run)) == 2 and watch(run, Evaluations(run)) == 0
    going_on = Parent(os.getppid(), step=LAST, last_step=LAST + 20)
    save(run, LAST, stopped_early=True, seed=1)
    evaluations = Evaluations(run, LAST + 10, LAST + 20)
    assert watch(run, evaluations, parent=going_on) == 3 and evaluations.steps == [
        LAST,
        LAST + 10,
        LAST + 20,
    ]
    save(run, LAST + 15, stopped_early=True)  # of a start with fewer steps
    (run / "checkpoints" / f"step_{LAST + 20}" / "manifest.json").unlink()
    assert watch(run, evaluations, parent=going_on) == 1


def test_a_card_shows_no_evaluation_of_a_later_checkpoint(run: Path) -> None:
    save(run, 20)
    save(run, LAST)
    assert watch(run, Evaluations(run)) == 2
    assert newest_evaluation(run, LAST) == {f"loss, at step {LAST}": 2.0}
    assert (
        newest_evaluation(run, LAST - 1) == {"loss, at step 20": 1.0}
        and newest_evaluation(run, 10) == {}
    )
