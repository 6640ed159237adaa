"""The size of a checkpoint is known before the first one is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.checkpoint.layout import payload_files, read_recipe, read_state, resolve_checkpoint
from pretrain.checkpoint.size import checkpoint_bytes
from pretrain.train import main
from tests.support.tiny_run import Tiny

# Large enough for tensors to outweigh everything else, as in a real model.
LARGER = ("model.hidden_size=128", "model.moe.moe_intermediate_size=512")


@pytest.mark.parametrize(
    ("optimizer", "precision", "zero"),
    [("adamw", "fp32", 1), ("adamw", "bf16", 2), ("muon", "fp32", 0), ("lion", "fp32", 1)],
)
def test_a_real_checkpoint_is_at_most_ten_percent_smaller_than_predicted(
    optimizer: str, precision: str, zero: int, tiny: Tiny, tmp_path: Path
) -> None:
    settings = [
        *LARGER,
        f"optimizer={{kind: {optimizer}, learning_rate: 1.0e-3}}",
        f"train.precision={precision}",
    ]
    assert main(tiny.arguments(tmp_path / "run", *settings, steps=2, zero=zero)) == 0
    folder = resolve_checkpoint(tmp_path / "run" / "checkpoints")
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in payload_files(folder)
    }
    predicted = checkpoint_bytes(read_recipe(folder), world_size=1, zero_stage=zero)
    total = sum(files.values())
    assert total <= predicted <= 1.1 * total, json.dumps(files, indent=1)
    assert read_state(folder)["step"] == 2
