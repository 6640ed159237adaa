"""training_history.json: entries of validations, whole at every moment, the same after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pretrain.callbacks.base import Callback
from pretrain.callbacks.history import COLUMNS, HISTORY, TrainingHistory, history_of
from pretrain.callbacks.metrics import METRICS, MetricsFiles
from pretrain.config.load import load_recipe
from pretrain.config.phases import PhaseConfig
from pretrain.config.timeline import Timeline

PLAIN = Timeline(load_recipe("debug"))


def train(step: int, loss: float) -> dict[str, Any]:
    clock = {"grad_norm": 1.0, "tokens_per_second": 50.0, "seconds": 0.5 * step}
    return {
        "kind": "train",
        "step": step,
        "tokens": 10 * step,
        "epoch": step / 4,
        "loss": loss,
        "learning_rate": 0.1 / step,
        **clock,
    }


def validation(step: int, loss: float, targets: int = 64) -> dict[str, Any]:
    return {
        "kind": "validation",
        "step": step,
        "tokens": 10 * step,
        "epoch": step / 4,
        "validation_loss": loss,
        "targets": targets,
    }


ROWS = [
    train(1, 4.0),
    train(3, 1.0),
    validation(3, 2.0),
    {"kind": "usage", "step": 3},
    train(4, 3.0),
    validation(4, 1.5),
    train(5, 1.0),
    validation(5, 1.75),
]


def test_an_entry_has_the_mean_training_loss_over_its_steps_and_the_last_of_the_rest() -> None:
    content = history_of(ROWS, validates=True, timeline=PLAIN).content()
    assert (
        content["step"] == [3, 4, 5]
        and content["tokens"] == [30, 40, 50]
        and content["epoch"] == [0.75, 1.0, 1.25]
    )
    assert content["train_loss"] == [
        (1 * 4.0 + 2 * 1.0) / 3,
        3.0,
        1.0,
    ]  # the row of step 3 is the mean of two steps
    assert content["val_loss"] == [2.0, 1.5, 1.75]
    assert content["perplexity"] == [math.exp(loss) for loss in content["val_loss"]]
    assert content["learning_rate"] == [0.1 / 3, 0.1 / 4, 0.1 / 5] and content["seconds"] == [
        1.5,
        2.0,
        2.5,
    ]
    assert content["best"] == {name: content[name][1] for name in COLUMNS}


def test_a_row_weighs_the_steps_that_it_is_the_mean_of() -> None:
    rows = [
        train(510, 4.0) | {"steps": 5},
        train(520, 2.0) | {"steps": 10},
        validation(520, 2.0),
    ]  # a branch: earlier rows are elsewhere
    assert history_of(rows, validates=True, timeline=PLAIN).content()["train_loss"] == [
        (5 * 4.0 + 10 * 2.0) / 15
    ]


def test_the_second_validation_of_a_step_replaces_the_first_and_is_not_the_best() -> None:
    rows = [
        train(1, 4.0),
        validation(1, 3.0),
        train(3, 4.0),
        validation(4, 2.0),
        train(4, 1.0),
        validation(4, 1.5, targets=999),
    ]
    content = history_of(rows, validates=True, timeline=PLAIN).content()
    assert (
        content["step"] == [1, 4]
        and content["val_loss"] == [3.0, 1.5]
        and content["train_loss"] == [4.0, (2 * 4.0 + 1.0) / 3]
    )
    assert (
        content["best"]["step"] == 4
        and content["best"]["val_loss"] == 2.0
        and content["val_targets"] == [64, 999]
    )


def test_the_best_starts_anew_where_losses_do_not_compare() -> None:
    recipe = load_recipe("debug")
    short = {
        "name": "short",
        "tokens": 10 * recipe.train.tokens_per_step,
        "sequence_length": recipe.train.sequence_length // 2,
    }
    lengths = Timeline(
        recipe.model_copy(update={"phases": [PhaseConfig(**short), PhaseConfig(name="long")]})
    )
    losses = [
        validation(step, loss)
        for step, loss in ((5, 3.0), (20, 1.0), (21, 2.0), (22, 1.5), (23, 1.75))
    ]
    assert lengths.phases[0].end_step == 20
    assert history_of(losses, validates=True, timeline=lengths).content()["best"]["step"] == 22
    assert history_of(losses, validates=True, timeline=PLAIN).content()["best"]["step"] == 20
    fewer = [validation(5, 1.0), validation(10, 2.0, targets=32), validation(15, 1.5, targets=32)]
    assert history_of(fewer, validates=True, timeline=PLAIN).content()["best"]["step"] == 15


def test_a_rollback_leaves_no_entry_of_a_step_that_is_taken_again(tmp_path: Path) -> None:
    files: tuple[Callback, ...] = (
        MetricsFiles(tmp_path),
        TrainingHistory(tmp_path, validates=True, timeline=PLAIN),
    )

    def tell(*rows: dict[str, Any]) -> dict[str, Any]:
        for row in rows:
            for callback in files:
                callback.on_record(row)
        content: dict[str, Any] = json.loads((tmp_path / HISTORY).read_text())
        return content

    before = tell(
        *(
            row
            for step in (10, 20, 30, 40)
            for row in (train(step, 4.0), validation(step, 3.0 if step < 40 else 2.0))
        )
    )
    assert before["step"] == [10, 20, 30, 40] and before["best"]["step"] == 40
    for callback in files:
        callback.on_rollback(25)
    assert tell()["step"] == [10, 20]
    after = tell(train(30, 1.0) | {"steps": 5}, train(40, 4.0), validation(40, 2.5))
    assert (
        after["step"] == [10, 20, 40]
        and after["val_loss"] == [3.0, 3.0, 2.5]
        and after["best"]["val_loss"] == 2.5
    )
    assert after["train_loss"] == [4.0, 4.0, (5 * 1.0 + 10 * 4.0) / 15]


def test_without_a_validation_split_each_row_of_training_is_an_entry() -> None:
    content = history_of(ROWS, validates=False, timeline=PLAIN).content()
    assert (
        content["step"] == [1, 3, 4, 5]
        and content["val_loss"] == [None] * 4
        and content["best"] is None
    )


@pytest.mark.parametrize("cut", range(len(ROWS)))
def test_a_resumed_run_writes_the_history_of_one_that_never_stopped(
    tmp_path: Path, cut: int
) -> None:
    step = max((row["step"] for row in ROWS[:cut]), default=0)
    kept = [row for row in ROWS if row["step"] <= step]
    later = [train(9, 9.0), validation(9, 9.0)]  # beyond the checkpoint: run again
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in [*kept, *later]))
    callback = TrainingHistory(tmp_path, validates=True, timeline=PLAIN)
    callback.on_start(step, 5)
    for row in ROWS[len(kept) :]:
        callback.on_record(row)
    if len(kept) < len(ROWS):
        assert (
            json.loads((tmp_path / HISTORY).read_text())
            == history_of(ROWS, validates=True, timeline=PLAIN).content()
        )
        assert (
            history_of([*kept, *later], validates=True, timeline=PLAIN).content()
            != history_of(ROWS, validates=True, timeline=PLAIN).content()
        )


def test_a_loss_beyond_every_float_has_no_perplexity_and_is_json() -> None:
    content = history_of([validation(1, 1000.0)], validates=True, timeline=PLAIN).content()
    assert content["perplexity"] == [None] and content["train_loss"] == [None]
    json.dumps(content, allow_nan=False)
