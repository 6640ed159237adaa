"""Validation computes many windows at once: fewer forward passes, the same loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.training.trainer import Trainer
from tests.support.tiny_run import Tiny, make_trainer

# Windows of 32 tokens; a micro batch has two.
NATIVE = "model.moe={kind: deepspeed, num_experts: 4, top_k: 2, moe_intermediate_size: 16"


def measured(trainer: Trainer, max_windows: int | None) -> tuple[float, list[int]]:
    """The summed loss, and the windows of each forward pass."""
    assert trainer.validator is not None
    sizes = [len(batch.input_ids_BS) for batch in trainer.validator.batches(max_windows)]
    return trainer.engine.evaluate(trainer.validator.batches(max_windows))[0], sizes


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_more_windows_at_once_give_the_same_loss(
    precision: str, tiny: Tiny, tmp_path: Path
) -> None:
    losses, sizes = {}, {}
    for tokens in (1, 256, 4096):
        trainer = make_trainer(
            tiny,
            tmp_path / f"run{tokens}",
            f"validation.batch_tokens={tokens}",
            f"train.precision={precision}",
            zero=1,
        )
        losses[tokens], sizes[tokens] = measured(trainer, None)
    assert set(sizes[1]) == {2}
    assert max(sizes[256]) <= 8 and len(sizes[256]) <= len(sizes[1]) / 3
    assert max(sizes[4096]) > 8 and len(sizes[4096]) < len(sizes[256])
    # A rounding of bf16's products depends on how many rows are computed together.
    tolerance = 1e-6 if precision == "fp32" else 1e-3
    assert losses[256] == pytest.approx(losses[1], rel=tolerance, abs=0)
    assert losses[4096] == pytest.approx(losses[1], rel=tolerance, abs=0)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("drops", "causal", "size"), [("true", "false", 2), ("false", "true", 8)])
def test_experts_that_drop_tokens_keep_the_micro_batch(
    drops: str, causal: str, size: int, tiny: Tiny, tmp_path: Path
) -> None:
    trainer = make_trainer(
        tiny,
        tmp_path / "run",
        f"{NATIVE}, drop_tokens: {drops}, causal: {causal}}}",
        zero=1,
    )
    assert set(measured(trainer, 8)[1]) == {size}
