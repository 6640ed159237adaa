"""Expert usage in real runs of two ranks: the counts are those of the whole run, in files, rows and
TensorBoard, also after a resume.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.analysis.expert_usage import (
    SCALARS,
    UsageWindow,
    load_window,
    usage_columns,
    window_path,
    window_steps,
)
from pretrain.engine.monitor import TRAIN_LOSS
from tests.support.ranks import Results, run_cases
from tests.support.tiny_run import STEP_TOKENS, Tiny, curve, make_trainer

PEER = (
    "model.moe={kind: peer, product_key_sizes: [8, 8], query_dim: 16, num_heads: 2, top_k: 4,"
    " moe_intermediate_size: 1}"
)
STEPS, INTERVAL, RESUMED_AT = 4, 2, 3
CASES = {
    # Everything that runs a layer more than once a step: recomputation, the pass that counts for a
    # loss over the global batch.
    "peer": (
        PEER,
        "train.activation_checkpointing=true",
        "logging.tensorboard=true",
        "logging.hot_expert_factor=2.0",
    ),
    "spread": (PEER, "parallel.ep_size=2"),
    "dropless": (
        "model.moe.balance_scope=global_batch",
        "train.activation_checkpointing=true",
        "model.multi_token_prediction={loss_weight: 0.3}",
    ),
}
# Layers, experts, choices of a token.
SIZES = {"peer": (2, 64, 8), "spread": (2, 64, 8), "dropless": (3, 4, 2)}


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """The folder of all runs, the first resumed at step 3, and the records of each start."""
    folder = tmp_path_factory.mktemp("usage")
    cases: list[dict[str, Any]] = []
    for name, overrides in CASES.items():
        every = f"logging.usage_interval_steps={INTERVAL}"
        cases.append(
            {
                "name": name,
                "run_path": str(folder / name),
                "arguments": tiny.arguments(folder / name, every, *overrides, steps=STEPS),
            }
        )
    cases[0]["resume_at"] = RESUMED_AT
    return folder, run_cases("training_runs", cases, 2, folder)


def windows(run: Path) -> list[UsageWindow]:
    return [load_window(window_path(run / "usage", step)) for step in window_steps(run / "usage")]


def usage_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "usage"]


@pytest.mark.parametrize("name", CASES)
def test_every_choice_of_every_token_of_both_ranks_is_counted_once(
    runs: tuple[Path, Results], name: str
) -> None:
    layers, experts, choices = SIZES[name]
    for window in windows(runs[0] / name):
        assert window.counts_LE.shape == (layers, experts) and window.layers == list(range(layers))
        np.testing.assert_array_equal(
            window.counts_LE.sum(axis=1), window.steps * STEP_TOKENS * choices
        )
    rows = usage_rows(runs[1][name]["curve"])
    assert [(row["step"], row["steps"], row["tokens"]) for row in rows] == [
        (2, 2, 2 * STEP_TOKENS),
        (4, 2, 4 * STEP_TOKENS),
    ]
    assert [path.suffix for path in (runs[0] / name / "usage").iterdir()] == [".npz"] * 2


def test_experts_spread_over_ranks_are_counted_under_the_same_numbers(
    runs: tuple[Path, Results],
) -> None:
    whole, spread = (windows(runs[0] / name)[0].counts_LE for name in ("peer", "spread"))
    assert np.abs(whole - spread).sum() <= 0.01 * whole.sum()  # a close choice may flip by rounding
    assert np.abs(whole - np.roll(spread, 32, axis=1)).sum() > 0.2 * whole.sum()


def test_rows_say_of_the_files_what_the_analysis_says(runs: tuple[Path, Results]) -> None:
    run, rows = runs[0] / "peer", usage_rows(runs[1]["peer"]["resumed"])
    for row, window in zip(rows, windows(run), strict=True):
        columns = usage_columns(window, hot_factor=2.0)
        assert {name: row[name] for name in columns} == columns
        assert usage_columns(window, hot_factor=1.0)["hot_experts"] > columns["hot_experts"] > 0
        window.counts_LE[:, [0, 63]] += [[-1, 1]]
        assert usage_columns(window, hot_factor=2.0) != columns


def test_a_resume_starts_the_cut_window_anew_and_changes_nothing_else(
    runs: tuple[Path, Results],
) -> None:
    result = runs[1]["peer"]
    assert result["resumed_from"] == RESUMED_AT
    last = result["resumed"][result["resumed"].index(usage_rows(result["resumed"])[-1])]
    assert (last["step"], last["steps"]) == (STEPS, STEPS - RESUMED_AT)
    assert [row for row in result["resumed"] if row is not last] == [
        row for row in result["curve"] if (row["kind"], row["step"]) != ("usage", STEPS)
    ]
    assert [(window.step, window.steps) for window in windows(runs[0] / "peer")] == [(2, 2), (4, 1)]


def test_tensorboard_has_curves_histograms_and_pictures_beside_the_training_loss(
    runs: tuple[Path, Results],
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = runs[0] / "peer" / "tensorboard"
    assert (
        len(list(folder.glob("events.*"))) == 2
    )  # one a start: a second writer of one start would hide what the first writes next
    events = EventAccumulator(str(folder), {"scalars": 0, "histograms": 0, "images": 0}).Reload()
    last = usage_rows(runs[1]["peer"]["resumed"])[-1]
    assert TRAIN_LOSS in events.Tags()["scalars"]
    for name in SCALARS:
        worst = min if name == "normalized_entropy" else max
        shown = events.Scalars(f"usage/{name}_of_worst_layer")[-1].value
        assert shown == pytest.approx(worst(layer[name] for layer in last["layers"]), rel=1e-6)
    histogram = events.Histograms("usage/log2_1_plus_load")[-1]
    assert (histogram.step, histogram.histogram_value.num) == (STEPS, 2 * 64)
    hottest = max(layer["max_over_mean"] for layer in last["layers"])
    assert histogram.histogram_value.max == pytest.approx(math.log2(1 + hottest))
    picture = events.Images("usage/load_by_layer")[-1]
    assert (picture.step, picture.width, picture.height) == (STEPS, 512, 512)
    assert events.Scalars("usage/gini")[-1].value == pytest.approx(last["gini"], rel=1e-6)


def test_without_tensorboard_there_are_rows_and_files_but_no_pictures(
    runs: tuple[Path, Results],
) -> None:
    assert not (runs[0] / "dropless" / "tensorboard").exists()
    assert window_steps(runs[0] / "dropless" / "usage") == [2, 4]


@pytest.mark.parametrize("name", CASES)
def test_the_table_of_scalars_has_no_rows_of_usage(runs: tuple[Path, Results], name: str) -> None:
    with (runs[0] / name / "training_log.csv").open() as file:
        rows = list(csv.DictReader(file))
    scalars = [row for row in curve(runs[0] / name) if row["kind"] != "usage"]
    assert [(row["kind"], int(row["step"])) for row in rows] == [
        (row["kind"], row["step"]) for row in scalars
    ]
    assert {row["kind"] for row in rows} == {"train", "validation"}
    assert (runs[0] / name / "training_curves.png").stat().st_size > 0


@pytest.mark.parametrize("overrides", [(PEER,), ()], ids=["peer", "dropless"])
def test_taking_starts_anew_and_evaluation_is_not_counted(
    tiny: Tiny, in_process: None, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    trainer = make_trainer(tiny, tmp_path / "run", *overrides, zero=1)
    engine, batches = trainer.engine, trainer.loader.step_batches(0)
    engine.train_step(batches, 1.0)
    once = engine.usage.take()
    assert once is not None and once.device.type == "cpu"
    engine.evaluate(batches)
    nothing = engine.usage.take()
    assert nothing is None or not nothing.any()
    engine.train_step(batches, 1.0)
    engine.train_step(batches, 1.0)
    twice = engine.usage.take()
    assert twice is not None and twice.sum() == 2 * once.sum()


def test_a_dense_model_has_no_usage(tiny: Tiny, in_process: None, tmp_path: Path) -> None:
    engine = make_trainer(
        tiny,
        tmp_path / "run",
        "model.layer_pattern={kind: all_dense}",
        "model.intermediate_size=32",
        zero=1,
    ).engine
    assert engine.usage.take() is None
