"""What TensorBoard shows of a run, in its order, and that large models get no more of it."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.analysis.expert_usage import UsageWindow, load_map, usage_columns
from pretrain.callbacks.base import MetricsRecord
from pretrain.callbacks.deepspeed_monitor import DeepSpeedMonitor
from pretrain.callbacks.events import events_of
from pretrain.callbacks.expert_usage import ExpertUsage
from pretrain.engine.monitor import Monitor
from pretrain.training.records import Position, ValidationRecord
from tests.support.tiny_run import SCRIPT, Started, curve, make_tiny

# TensorBoard sorts by these names; all of its digits here are single, so that Python sorts alike.
TRAINING = [
    "at_a_glance/1_loss",
    "at_a_glance/2_learning_rate",
    "at_a_glance/3_gradient_norm",
    "at_a_glance/4_tokens_per_second",
    "moe/aux_loss_of_worst_layer",
    "moe/dropped_share_of_worst_layer",
    "moe/entropy_of_worst_layer",
    "moe/load_max",
    "moe/load_min",
    "moe/unused_experts",
    "moe/z_loss_of_worst_layer",
    "timing/data_stall_seconds",
    "timing/down_seconds",
    "timing/elapsed_seconds",
    "timing/goodput",
    "timing/lost_seconds",
    "timing/lost_steps",
    "timing/productive_seconds",
    "timing/restarts",
    "timing/saving_seconds",
    "timing/saving_share",
    "timing/startup_seconds",
    "timing/validation_seconds",
    "train/aux_loss",
    "train/dropped_share",
    "train/epoch",
    "train/loss_scale",
    "train/max_violation",
    "train/perplexity",
    "train/router_entropy",
    "train/seconds",
    "train/skipped_steps",
    "train/stall_seconds",
    "train/steps",
    "train/tokens",
    "train/total_loss",
    "train/z_loss",
    "usage/gini",
    "usage/gini_of_worst_layer",
    "usage/hot_experts",
    "usage/hot_experts_of_worst_layer",
    "usage/max_over_mean",
    "usage/max_over_mean_of_worst_layer",
    "usage/normalized_entropy",
    "usage/normalized_entropy_of_worst_layer",
    "usage/unused_share",
    "usage/unused_share_of_worst_layer",
    "validation/perplexity",
    "validation/targets",
]
HISTOGRAMS, IMAGES = ["usage/log2_1_plus_load"], ["usage/load_by_layer"]
STEPS = 4


def read(folder: Path) -> EventAccumulator:
    """All events of one run of TensorBoard."""
    return EventAccumulator(str(folder), {"scalars": 0, "images": 0, "histograms": 0}).Reload()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training, started as a user starts it, with our own ds_config."""
    folder = tmp_path_factory.mktemp("first_sight")
    tiny = make_tiny(folder)
    settings = ("logging.tensorboard=true", "logging.usage_interval_steps=2")
    arguments = tiny.arguments(folder / "run", *settings, steps=STEPS, zero=None)
    started = Started([sys.executable, SCRIPT, *arguments], folder)
    assert started.wait() == 0, started.stderr
    return folder / "run"


def test_the_first_cards_are_losses_learning_rate_gradient_norm_and_speed(run: Path) -> None:
    tags = read(run / "tensorboard").Tags()
    assert sorted(tags["scalars"]) == TRAINING
    assert (tags["histograms"], tags["images"]) == (HISTOGRAMS, IMAGES)
    assert read(run / "tensorboard" / "validation").Tags()["scalars"] == ["at_a_glance/1_loss"]


def test_the_first_chart_has_both_losses_of_every_record(run: Path) -> None:
    rows = curve(run)
    for folder, kind, column in (
        ("tensorboard", "train", "loss"),
        ("tensorboard/validation", "validation", "validation_loss"),
    ):
        shown = read(run / folder).Scalars("at_a_glance/1_loss")
        written = [(row["step"], row[column]) for row in rows if row["kind"] == kind]
        assert len({step for step, _ in written}) >= 2
        assert [event.step for event in shown] == [step for step, _ in written]
        assert [event.value for event in shown] == pytest.approx([loss for _, loss in written])


def test_perplexities_of_training_and_validation_are_in_every_file_and_in_tensorboard(
    run: Path,
) -> None:
    events = read(run / "tensorboard")
    with (run / "training_log.csv").open() as file:
        logged = list(csv.DictReader(file))
    for kind, loss, column, tag in (
        ("train", "loss", "perplexity", "train/perplexity"),
        ("validation", "validation_loss", "validation_perplexity", "validation/perplexity"),
    ):
        rows = [row for row in curve(run) if row["kind"] == kind]
        expected = [math.exp(row[loss]) for row in rows]
        assert len(expected) >= 2 and [row[column] for row in rows] == expected
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(expected)
        assert [float(row[column]) for row in logged if row["kind"] == kind] == expected


def test_a_loss_without_a_finite_perplexity_has_none() -> None:
    position = Position(step=1, tokens=8, epoch=None, phase="", phase_number=1)
    assert "validation_perplexity" not in ValidationRecord(position, 1000.0, 4).to_dict()
    assert ValidationRecord(position, 0.0, 4).to_dict()["validation_perplexity"] == 1.0


def test_deepspeed_s_engine_adds_no_run_and_no_tag_of_its_own(run: Path) -> None:
    files = (run / "tensorboard").rglob("events.*")
    assert {path.parent.relative_to(run).as_posix() for path in files} == {
        "tensorboard",
        "tensorboard/validation",
    }


def test_metrics_jsonl_still_has_the_load_of_every_expert(run: Path) -> None:
    for row in curve(run):
        if row["kind"] == "train":
            assert [len(layer["expert_load"]) for layer in row["layers"]] == [4, 4]


def synthetic(
    num_layers: int, num_experts: int
) -> tuple[MetricsRecord, MetricsRecord, UsageWindow]:
    """A record of training, one of usage and their window, for a model of any size."""
    counts_LE = np.random.default_rng(0).integers(1, 1000, (num_layers, num_experts))
    counts_LE[-1, :2] = 0
    shares_LE = counts_LE / counts_LE.sum(axis=1, keepdims=True)
    layers = [
        {"layer": layer, "expert_load": load.tolist(), "aux_loss": 1.0, "z_loss": 2.0 + layer}
        | {"entropy": 3.0 + layer, "dropped_share": 0.0}
        for layer, load in enumerate(shares_LE)
    ]
    window = UsageWindow(100, 100, list(range(num_layers)), counts_LE)
    usage = {"kind": "usage", "step": 100, "steps": 100, **usage_columns(window, 5.0)}
    return {"kind": "train", "step": 100, "loss": 2.0, "layers": layers}, usage, window


def shown(folder: Path, num_layers: int, num_experts: int) -> dict[str, Any]:
    """The tags that TensorBoard finds after one window of such a model."""
    section = {"enabled": True, "output_path": str(folder), "job_name": "tensorboard"}
    monitor = Monitor({"tensorboard": section}, writes=True, samples=lambda: 0)
    train, usage, window = synthetic(num_layers, num_experts)
    callbacks = (
        DeepSpeedMonitor(monitor),
        ExpertUsage(folder / "usage", monitor.summary_writer, 5.0),
    )
    for callback in callbacks:
        callback.on_start(0, 100)
        callback.on_record(train)
        callback.on_usage(window)
        callback.on_record(usage)
    assert monitor.summary_writer is not None
    monitor.summary_writer.flush()
    tags: dict[str, Any] = read(folder / "tensorboard").Tags()
    return tags


def test_sixty_layers_of_256_experts_have_the_tags_of_two_layers_of_four(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)  # the backends ask for it
    small, large = shown(tmp_path / "small", 2, 4), shown(tmp_path / "large", 60, 256)
    assert small == large
    assert set(large["scalars"]) < set(TRAINING) and len(large["scalars"]) == 18
    assert (large["histograms"], large["images"]) == (HISTOGRAMS, IMAGES)
    picture = read(tmp_path / "large" / "tensorboard").Images(IMAGES[0])[0]
    assert (picture.width, picture.height) == (2 * 256, 9 * 60)


def test_summaries_are_the_worst_layer_and_the_extremes_of_all_experts() -> None:
    train, usage, window = synthetic(60, 256)
    loads_LE = window.counts_LE / window.counts_LE.mean(axis=1, keepdims=True)
    events = dict(events_of(train)) | dict(events_of(usage))
    assert events["moe/load_max"] == pytest.approx(loads_LE.max())
    assert events["moe/load_min"] == 0 and events["moe/unused_experts"] == 2
    assert (events["moe/z_loss_of_worst_layer"], events["moe/entropy_of_worst_layer"]) == (61, 3)
    assert events["usage/unused_share_of_worst_layer"] == 2 / 256
    entropies = [layer["normalized_entropy"] for layer in usage["layers"]]
    assert events["usage/normalized_entropy_of_worst_layer"] == min(entropies)


def test_many_experts_are_folded_into_a_tile_for_each_layer() -> None:
    counts_LE = np.ones((3, 16), dtype=np.int64)
    counts_LE[2, 5] = 17
    tiles = load_map(counts_LE, [0, 1, 2], max_columns=8)
    assert tiles.shape == (12, 12)  # two by two tiles of 4 x 4 with a line around each
    np.testing.assert_array_equal(tiles[1:5, 1:5], np.ones((4, 4)))
    assert tiles[8, 2] == 17 / 2 and np.isnan(tiles[6:, 6:]).all()


def test_a_row_of_the_map_is_the_layer_of_that_number_and_dense_layers_are_empty() -> None:
    counts_LE = np.arange(1, 9).reshape(2, 4)
    loads = load_map(counts_LE, [1, 3], max_columns=16)
    assert loads.shape == (4, 4) and np.isnan(loads[[0, 2]]).all()
    np.testing.assert_allclose(loads[[1, 3]], counts_LE / counts_LE.mean(axis=1, keepdims=True))
