"""A real run with multi-token prediction: its records, its checkpoints, and how it resumes."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint.layout import write_pointer
from pretrain.checkpoint.weights import load_model
from pretrain.train import main
from tests.support.tiny_run import Tiny, curve

MULTI_TOKEN = "model.multi_token_prediction={loss_weight: 0.3}"
KINDS = {
    "dropless": ("model.moe.balance_scope=global_batch", "model.moe.bias_balancing={}"),
    "deepspeed": ("model.moe.drop_tokens=false",),
}


@pytest.mark.parametrize("kind", ["dropless", pytest.param("deepspeed", marks=pytest.mark.full)])
def test_rows_have_its_loss_and_a_resumed_run_the_same(
    tiny: Tiny, in_process: None, tmp_path: Path, kind: str
) -> None:
    run = tmp_path / "run"
    arguments = tiny.arguments(run, MULTI_TOKEN, f"model.moe.kind={kind}", *KINDS[kind], steps=6)
    assert main(arguments) == 0
    whole = curve(run)
    train = [row for row in whole if row["kind"] == "train"]
    for row in train:
        router_losses = sum(
            weight * row[name] * 3 for name, weight in (("aux_loss", 0.01), ("z_loss", 0.001))
        )
        assert row["total_loss"] == pytest.approx(
            row["loss"] + 0.3 * row["multi_token_loss"] + router_losses, rel=1e-5
        )
        assert [layer["layer"] for layer in row["layers"]] == [0, 1, 2]
        assert all(
            math.isclose(sum(layer["expert_load"]), 1.0, rel_tol=1e-5) for layer in row["layers"]
        )
    assert train[-1]["multi_token_loss"] < train[0]["multi_token_loss"]
    with (run / "training_log.csv").open() as file:
        assert [
            float(row["multi_token_loss"]) for row in csv.DictReader(file) if row["kind"] == "train"
        ] == [row["multi_token_loss"] for row in train]
    # Validation scores the next token alone.
    assert all("multi_token_loss" not in row for row in whole if row["kind"] == "validation")

    checkpoints = run / "checkpoints"
    model, _ = load_model(checkpoints / "step_6")
    assert model.multi_token is not None
    shutil.rmtree(checkpoints / "step_6")
    write_pointer(checkpoints, "step_3")
    assert main(arguments) == 0
    assert json.dumps(curve(run)) == json.dumps(whole)
