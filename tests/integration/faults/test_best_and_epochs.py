"""Which checkpoints a run keeps by name when validations read samples, steps are skipped, and the
run goes back.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain.checkpoint.layout import pointers, read_state
from pretrain.guards.detect import Violation
from pretrain.training.trainer import Trainer
from tests.support.fault_injection import Injection, poison_batches
from tests.support.tiny_run import Tiny, curve, make_trainer

SMALL = (
    "model.num_hidden_layers=1",
    "checkpoint.keep_last=1",
    "checkpoint.interval_steps=100",
    "validation.interval_steps=2",
)
TARGETS = {"sample": 124, "whole": 1000}


def trainer_with(
    tiny: Tiny, run: Path, losses: dict[int, float], *overrides: str, steps: int
) -> Trainer:
    """A run whose validations find these losses by step, and 1.0 in the whole split."""
    trainer = make_trainer(tiny, run, *SMALL, *overrides, zero=1, steps=steps)

    def evaluate(batches: Iterable[Any]) -> tuple[float, int]:
        whole = sum(1 for _ in batches) > 2  # a sample of four windows is two batches
        loss, targets = (
            (1.0, TARGETS["whole"]) if whole else (losses[trainer.progress.step], TARGETS["sample"])
        )
        return loss * targets, targets

    trainer.engine.evaluate = evaluate
    return trainer


def skip(trainer: Trainer, step: int) -> None:
    """The update of a step is refused."""
    train_step = trainer.engine.train_step

    def refused(*given: Any, **named: Any) -> Any:
        return (
            train_step(*given[:3], lambda *_: True)
            if trainer.progress.step == step - 1
            else train_step(*given, **named)
        )

    trainer.engine.train_step = refused


def test_the_best_is_judged_on_one_sample_and_the_whole_split_takes_no_part(
    tiny: Tiny, tmp_path: Path
) -> None:
    settings = ("checkpoint.keep_best=true", "validation.max_windows=4")
    trainer = trainer_with(tiny, tmp_path, {2: 5.0, 4: 5.5, 5: 5.4}, *settings, steps=5)
    assert trainer.fit()
    assert (trainer.progress.best_step, trainer.progress.best_validation) == (2, 5.0)
    assert pointers(tmp_path / "checkpoints") == {"best": "step_2", "latest": "step_5"}
    rows = [
        (row["step"], row["validation_loss"], row["targets"])
        for row in curve(tmp_path)
        if row["kind"] == "validation"
    ]
    assert rows == [(2, 5.0, 124), (4, 5.5, 124), (5, 5.4, 124), (5, 1.0, 1000)]
    state = read_state(tmp_path / "checkpoints" / "step_5")
    assert (state["validation_loss"], state["validation_step"], state["validation_targets"]) == (
        1.0,
        5,
        1000,
    )
    state = read_state(tmp_path / "checkpoints" / "step_2")
    assert (state["validation_loss"], state["validation_step"], state["validation_targets"]) == (
        5.0,
        2,
        124,
    )


def test_a_skipped_step_is_never_the_best_and_counts_the_tokens_of_its_phase(
    tiny: Tiny, tmp_path: Path
) -> None:
    phases = "phases=[{name: large, tokens: 768}, {name: small, global_batch_size: 4}]"
    losses = {2: 5.0, 3: 4.9, 4: 3.0, 6: 4.0, 7: 4.2}
    trainer = trainer_with(
        tiny,
        tmp_path,
        losses,
        "checkpoint.keep_best=true",
        "validation.max_windows=4",
        phases,
        steps=5,
    )
    skip(trainer, 4)
    assert trainer.fit()
    assert trainer.progress.best_step == 6 and pointers(tmp_path / "checkpoints") == {
        "best": "step_6",
        "latest": "step_7",
    }
    assert (trainer.progress.skipped_steps, trainer.progress.skipped_tokens) == (1, 128)


def test_a_best_that_the_run_went_behind_is_forgotten_and_the_next_one_kept(
    tiny: Tiny, tmp_path: Path
) -> None:
    losses = {2: 5.0, 4: 4.5, 6: 5.1, 8: 4.0, 10: 4.8, 11: 4.9}
    settings = (
        "checkpoint.keep_best=true",
        "validation.max_windows=4",
        "checkpoint.interval_steps=6",
        "checkpoint.keep_last=2",
    )
    trainer = trainer_with(tiny, tmp_path, losses, *settings, steps=11)
    one_step = trainer._step

    def step() -> bool:
        if trainer.progress.step == 8 and losses[8] == 4.0:
            # It is written in the background.
            trainer.checkpoints.store.finish()
            assert pointers(tmp_path / "checkpoints") == {"best": "step_8", "latest": "step_8"}
            losses[8] = 4.7
            trainer._roll_back(Violation("spike", "rollback", 8, "it was told to"))
            assert pointers(tmp_path / "checkpoints") == {"latest": "step_6"}
            return False
        return one_step()

    trainer._step = step
    assert trainer.fit()
    assert (trainer.progress.best_step, trainer.progress.best_validation) == (8, 4.7)
    assert pointers(tmp_path / "checkpoints") == {"best": "step_8", "latest": "step_11"}


def test_the_best_is_kept_from_where_a_resumed_run_begins_to_keep_it(
    tiny: Tiny, tmp_path: Path
) -> None:
    assert trainer_with(tiny, tmp_path, {2: 4.0, 3: 5.0}, "validation.max_windows=4", steps=3).fit()
    trainer = trainer_with(
        tiny,
        tmp_path,
        {4: 4.5, 5: 4.6},
        "validation.max_windows=4",
        "checkpoint.keep_best=true",
        steps=5,
    )
    trainer.resume(tmp_path / "checkpoints" / "step_3")
    assert trainer.fit() and trainer.progress.best_step == 4
    assert pointers(tmp_path / "checkpoints") == {"best": "step_4", "latest": "step_5"}


def test_every_epoch_is_kept_whether_it_ends_with_a_phase_in_a_skipped_step_or_in_data_that_is_passed_over(
    tiny: Tiny, tmp_path: Path
) -> None:
    phases = "phases=[{name: one, tokens: 1280}, {name: two, tokens: 1280}, {name: three}]"
    back = ("guards.non_finite.action=rollback", "guards.rollback={max_times: 1, skip_steps: 3}")
    losses = dict.fromkeys(range(15), 5.0)
    settings = (
        "checkpoint.keep_epochs=true",
        "checkpoint.interval_steps=12",
        "validation.max_windows=4",
        phases,
        *back,
    )
    trainer = trainer_with(tiny, tmp_path, losses, *settings, steps=14)
    trainer.loader.epochs = lambda step: (
        trainer.loader.position(step) / 40
    )  # an epoch is five steps
    skip(trainer, 10)  # the end of the second phase and the second epoch
    poison_batches(trainer, Injection(trainer.engine, 0, 0, "loss"), {12})
    assert trainer.fit() and trainer.progress.rollbacks == 1
    named = {"epoch_1": "step_5", "epoch_2": "step_11", "epoch_3": "step_13", "latest": "step_14"}
    assert pointers(tmp_path / "checkpoints") == named and trainer.progress.epoch_steps == {
        "1": 5,
        "2": 11,
        "3": 13,
    }
    assert all(
        (tmp_path / "checkpoints" / target / "manifest.json").is_file() for target in named.values()
    )
