"""One run of two ranks under the deepspeed launcher, in which everything goes wrong that can."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.layout import complete_checkpoints
from pretrain.checkpoint.weights import load_state_dict
from pretrain.engine.topology import free_port
from tests.integration.guards.test_guarded_runs import incidents
from tests.support.paths import LAUNCHERS, WORKERS
from tests.support.tiny_run import Started, Tiny, curve

SCRIPT = WORKERS / "faulty_training.py"
FAULTS: list[dict[str, Any]] = [
    {"rank": 1, "micro_batch": 1, "place": "expert", "factor": "nan", "batches": [2]},
    {"rank": 0, "micro_batch": 0, "place": "loss", "factor": "inf", "batches": [4]},
    {"rank": 1, "micro_batch": 0, "place": "loss", "factor": "30", "batches": [18]},
    {"rank": 0, "micro_batch": 1, "place": "dense", "factor": "1000", "batches": [21]},
]
SETTINGS = [
    "parallel.ep_size=2", "model.num_hidden_layers=1", "checkpoint.interval_steps=4",
    "validation.interval_steps=4", "train.precision=bf16",
    "guards.spike={action: rollback, window_steps: 16, min_rise: 1.5}", "guards.rollback.skip_steps=1",
    "guards.grad_norm={max: 50, action: skip}", "guards.early_stopping={patience: 6, min_delta: 9.0}", "guards.validation_gap={nats: 0.0001}",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Started]:
    folder = tmp_path_factory.mktemp("two") / "run"
    arguments = tiny.arguments(folder, *SETTINGS, steps=60, zero=2)
    launcher = [
        sys.executable,
        LAUNCHERS / "supervise.py",
        "deepspeed",
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
        SCRIPT,
    ]
    started = Started([*launcher, *arguments], folder.parent, {"FAULTS": json.dumps(FAULTS)})
    assert started.wait() == 0, started.stderr
    return folder, started


def test_every_fault_is_named_by_rank_and_micro_batch_and_the_ranks_act_alike(
    run: tuple[Path, Started],
) -> None:
    found = [entry for entry in incidents(run[0]) if entry["guard"] != "validation_gap"]
    assert [(entry["guard"], entry["action"], entry["step"]) for entry in found[:4]] == [
        ("non_finite", "skip", 3),
        ("non_finite", "skip", 5),
        ("spike", "rollback", 19),
        # Step 19 took batch 18; the run went back to step 16 and on with batch 20, so that step 18
        # took batch 21.
        ("grad_norm", "skip", 18),
    ]
    worst = [
        (entry["micro_batches"][0]["rank"], entry["micro_batches"][0]["micro_batch"])
        for entry in found[:3]
    ]
    assert worst == [(1, 1), (0, 0), (1, 0)]
    assert (
        "experts" in found[0]["micro_batches"][0]["not_finite"]
        and found[1]["micro_batches"][0]["not_finite"] == "loss"
    )
    assert all(
        " in " in sequence
        for entry in found
        for micro_batch in entry["micro_batches"]
        for sequence in micro_batch["sequences"]
    )


def test_the_terminal_names_each_of_them_once(run: tuple[Path, Started]) -> None:
    errors = run[1].stderr
    for sign in (
        "step 3: its loss or gradient is not finite; rank 1, micro batch 1",
        "the run goes back",
        "step 18: its gradient norm",
    ):
        assert errors.count(sign) == 1, errors


def test_patience_ends_the_run_well_and_nothing_that_is_saved_is_not_finite(
    run: tuple[Path, Started],
) -> None:
    folder, started = run
    assert "stopped early" in started.stdout and "steps were skipped" in started.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert (
        summary["stopped_early"]
        and summary["rollbacks"] == 1
        and summary["skipped_steps"] >= 4
        and summary["steps"] == 28
    )
    newest = complete_checkpoints(folder / "checkpoints")[0]
    assert newest.name == f"step_{summary['steps']}"
    assert all(weight.isfinite().all() for weight in load_state_dict(newest).values())
    assert started.survivors() == []


def test_rows_stand_once_for_every_step_and_hold_only_numbers(run: tuple[Path, Started]) -> None:
    text = (run[0] / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    steps = [row["step"] for row in curve(run[0]) if row["kind"] == "train"]
    assert steps == sorted(set(steps)) and {3, 5, 18}.isdisjoint(steps)
