"""Trackers without a package or a key: each is reported once, and the run ends as if it had none.

DeepSpeed's own sections likewise.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from pretrain.callbacks.build import missing_packages
from pretrain.config.load import load_recipe
from pretrain.config.trackers import Comet
from tests.support.tiny_run import SCRIPT, Started, Tiny, curve
from tests.support.tracker_files import wandb_history, wandb_records

STEPS, SAMPLES_OF_A_STEP = 2, 8


@pytest.fixture
def without_comet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Comet's package were not installed."""
    monkeypatch.setattr(Comet, "module", "a_module_that_nobody_has")


def test_a_missing_package_is_named_with_what_to_install(without_comet: None) -> None:
    recipe = load_recipe("debug", ["trackers={kinds: [wandb, comet]}"])
    assert missing_packages(recipe, {"comet": {"enabled": False}, "wandb": {"enabled": True}}) == [
        "trackers.kinds: comet needs a package that is not installed, so this run goes without it:"
        " pip install comet_ml"
    ]
    (section,) = missing_packages(load_recipe("debug"), {"comet": {"enabled": True}})
    assert section.startswith("the ds_config's 'comet' needs a package")


def test_failing_trackers_warn_once_and_deepspeeds_monitors_write(
    tiny: Tiny, tmp_path: Path
) -> None:
    sections = {
        "zero_optimization": {"stage": 1},
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "csv"},
        "wandb": {"enabled": True, "project": "of-deepspeed", "group": "g"},
        "comet": {"enabled": True, "project": "p"},
    }
    (tmp_path / "ds.json").write_text(json.dumps(sections))
    run = tmp_path / "run"
    arguments = tiny.arguments(
        run, "trackers={kinds: [comet]}", "logging.tensorboard=true", steps=STEPS, zero=None
    )
    # Neither has a key: W&B needs none offline, Comet does. They keep state for a whole process, so
    # this run has one of its own.
    variables = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "COMET_API_KEY": "",
        "HOME": str(tmp_path),
    }
    started = Started(
        [sys.executable, SCRIPT, *arguments, "--ds_config", str(tmp_path / "ds.json")],
        tmp_path,
        variables,
    )
    assert started.wait() == 0, started.stderr

    for told in ("warning: the ds_config's 'comet' failed", "warning: the tracker comet failed"):
        assert started.stderr.count(told) == 1, started.stderr
    rows = [row for row in curve(run) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2]

    with (tmp_path / "csv" / "at_a_glance_1_loss.csv").open() as file:
        assert [(int(row["step"]), float(row["1_loss"])) for row in csv.DictReader(file)] == [
            (row["step"], row["loss"]) for row in rows
        ]
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    history = wandb_history(list(wandb_records(log)))
    losses = {
        row["_step"]: row["at_a_glance/1_loss"] for row in history if "at_a_glance/1_loss" in row
    }
    assert losses == {row["step"] * SAMPLES_OF_A_STEP: row["loss"] for row in rows}
    assert [row["_step"] for row in history if "Train/Samples/lr" in row] == [8, 16]
    assert list((run / "tensorboard").glob("events.*"))
