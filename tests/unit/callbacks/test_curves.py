"""training_curves.png: what is in it, and how it is smoothed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.callbacks.curves import CURVES, TrainingCurves, figure_of, moving_average
from pretrain.callbacks.metrics import METRICS


def rows(**more: float) -> list[dict[str, Any]]:
    every = {"learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_second": 5.0, **more}
    train = [
        {"kind": "train", "step": step, "tokens": step, "loss": 4.0 - 0.1 * step, **every}
        for step in range(1, 9)
    ]
    return [
        *train,
        {"kind": "usage", "step": 8},
        {"kind": "validation", "step": 8, "tokens": 8, "validation_loss": 3.0},
    ]


def test_a_moving_average_has_no_bias_towards_zero_and_halves_weights() -> None:
    assert moving_average([3.0] * 5, 2.0) == pytest.approx([3.0] * 5)
    averages = moving_average([0.0, 0.0, 1.0], 1.0)
    assert averages == pytest.approx([0.0, 0.0, 1.0 / 1.75])
    assert moving_average([0.0, 0.0, 1.0], 100.0)[2] == pytest.approx(
        1 / 3, abs=0.01
    )  # smoothed so strongly that it is the mean


@pytest.mark.parametrize(
    "given,panels",
    [(rows(), 4), (rows(router_entropy=1.0, max_violation=0.2), 6), ([], 1)],
    ids=["dense", "moe", "no row"],
)
def test_there_is_a_panel_for_each_column_that_rows_have(
    given: list[dict[str, Any]], panels: int
) -> None:
    axes = figure_of(given, "run").axes
    assert len(axes) == panels
    legend = axes[0].get_legend()
    assert (
        [text.get_text() for text in legend.get_texts()]
        == ["train", "train, smoothed", "validation"]
        if given
        else legend is None
    )
    assert list(axes[0].lines[0].get_ydata()) == [
        row["loss"] for row in given if row["kind"] == "train"
    ]
    if given:
        assert (
            list(axes[0].lines[2].get_ydata()) == [3.0] and axes[1].get_ylabel() == "learning rate"
        )


def test_the_picture_appears_whole_and_replaces_the_earlier_one_also_after_an_error(
    tmp_path: Path,
) -> None:
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows()))
    TrainingCurves(tmp_path).on_end({})
    (tmp_path / CURVES).write_bytes(b"earlier")
    TrainingCurves(tmp_path).on_failure(RuntimeError())
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS, CURVES]
    assert (tmp_path / CURVES).read_bytes().startswith(b"\x89PNG")
