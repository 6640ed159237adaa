"""training_history.json: entries of validations, whole at every moment, the same after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pretrain.callbacks.history import COLUMNS, HISTORY, TrainingHistory, history_of
from pretrain.callbacks.metrics import METRICS


def train(step: int, loss: float) -> dict[str, Any]:
    clock = {"grad_norm": 1.0, "tokens_per_second": 50.0, "seconds": 0.5 * step}
    return {"kind": "train", "step": step, "tokens": 10 * step, "epoch": step / 4, "loss": loss, "learning_rate": 0.1 / step, **clock}


def validation(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "tokens": 10 * step, "epoch": step / 4, "validation_loss": loss}


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
    content = history_of(ROWS, validates=True).content()
    assert content["step"] == [3, 4, 5] and content["tokens"] == [30, 40, 50] and content["epoch"] == [0.75, 1.0, 1.25]
    assert content["train_loss"] == [(1 * 4.0 + 2 * 1.0) / 3, 3.0, 1.0]  # the row of step 3 is the mean of two steps
    assert content["val_loss"] == [2.0, 1.5, 1.75]
    assert content["perplexity"] == [math.exp(loss) for loss in content["val_loss"]]
    assert content["learning_rate"] == [0.1 / 3, 0.1 / 4, 0.1 / 5] and content["seconds"] == [1.5, 2.0, 2.5]
    assert content["best"] == {name: content[name][1] for name in COLUMNS}


def test_without_a_validation_split_each_row_of_training_is_an_entry() -> None:
    content = history_of(ROWS, validates=False).content()
    assert content["step"] == [1, 3, 4, 5] and content["val_loss"] == [None] * 4 and content["best"] is None


@pytest.mark.parametrize("cut", range(len(ROWS)))
def test_a_resumed_run_writes_the_history_of_one_that_never_stopped(tmp_path: Path, cut: int) -> None:
    step = max((row["step"] for row in ROWS[:cut]), default=0)
    kept = [row for row in ROWS if row["step"] <= step]
    later = [train(9, 9.0), validation(9, 9.0)]  # beyond the checkpoint: run again
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in [*kept, *later]))
    callback = TrainingHistory(tmp_path, validates=True)
    callback.on_start(step, 5)
    for row in ROWS[len(kept) :]:
        callback.on_row(row)
    if len(kept) < len(ROWS):
        assert json.loads((tmp_path / HISTORY).read_text()) == history_of(ROWS, validates=True).content()
        assert history_of([*kept, *later], validates=True).content() != history_of(ROWS, validates=True).content()


def test_a_loss_beyond_every_float_has_no_perplexity_and_is_json() -> None:
    content = history_of([validation(1, 1000.0)], validates=True).content()
    assert content["perplexity"] == [None] and content["train_loss"] == [None]
    json.dumps(content, allow_nan=False)
