"""Numbers that are not finite: such steps are skipped, fp16 halves its loss scale, and a run that
diverges stops before such a weight is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from data_pipeline.loading.batch import Batch
from pretrain.checkpoint.layout import complete_checkpoints
from pretrain.checkpoint.weights import load_state_dict
from pretrain.engine.engine import Engine
from pretrain.engine.step import StepResult
from tests.support.tiny_run import Tiny, make_trainer

Command = Callable[[list[str]], tuple[int, str]]


def masters(engine: Engine) -> list[torch.Tensor]:
    return [engine.masters.whole(parameter).clone() for parameter in engine.model.parameters()]


@pytest.mark.parametrize(
    ("precision", "zero", "learning_rate"),
    [("fp32", 0, 1e30), ("fp32", 1, 1e30), ("bf16", 2, 1e30), ("fp32", 1, 1e39)],
)
def test_training_that_diverges_ends_with_code_6_and_saves_only_finite_weights(
    precision: str, zero: int, learning_rate: float, tiny: Tiny, tmp_path: Path, train: Command
) -> None:
    run = tmp_path / "run"
    settings = [
        f"train.precision={precision}",
        f"optimizer.learning_rate={learning_rate}",
        "checkpoint.interval_steps=1",
    ]
    code, message = train(
        tiny.arguments(
            run,
            *settings,
            "validation.interval_steps=9",
            "guards.max_skipped_in_a_row=2",
            zero=zero,
        )
    )
    assert code == 6
    # The first update is finite unless the learning rate alone overflows; the gradients of the next
    # steps are not.
    what = (
        "the weights after step 1 are not finite"
        if learning_rate > 1e38
        else "3 steps in a row up to step 4 were skipped"
    )
    assert (
        f"error: {what}" in message
        and "lower optimizer.learning_rate" in message
        and "Traceback" not in message
    )
    checkpoints = complete_checkpoints(run / "checkpoints")
    assert [path.name for path in checkpoints] == ([] if learning_rate > 1e38 else ["step_1"])
    assert all(
        weight.isfinite().all() for path in checkpoints for weight in load_state_dict(path).values()
    )


@pytest.mark.skipif(
    not get_accelerator().is_fp16_supported(), reason="this device does not compute in fp16"
)
def test_fp16_skips_a_step_that_overflows_halves_the_scale_and_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_fp16 = tmp_path / "zero1.json"
    tiny_fp16.write_text(
        '{"zero_optimization": {"stage": 1}, "fp16": {"enabled": "auto", "initial_scale_power": 10,'
        ' "hysteresis": 1}}'
    )
    run = tmp_path / "run"
    run.mkdir()
    trainer = make_trainer(
        Tiny(tmp_path, tiny.recipe, tiny.data),
        run,
        "train.precision=fp16",
        "validation.interval_steps=9",
        zero=1,
    )
    engine, train_step = trainer.engine, trainer.engine.train_step
    seen: list[tuple[bool, float, bool]] = []
    overflowing = {"now": False}
    weight = engine.model.head.weight
    weight.register_hook(lambda gradient: gradient * 3e4 if overflowing["now"] else gradient)

    def observed(batches: list[Batch], factor: float, *options: Any, **named: Any) -> StepResult:
        if named:  # the search for what overflowed
            return train_step(batches, factor, *options, **named)
        overflowing["now"] = len(seen) == 2
        before = masters(engine)
        result = train_step(batches, factor, *options)
        unchanged = all(
            torch.equal(old, new) for old, new in zip(before, masters(engine), strict=True)
        )
        seen.append((result.applied, engine.loss_scale.value(), unchanged))
        return result

    monkeypatch.setattr(engine, "train_step", observed)
    assert trainer.fit()
    assert seen == [
        (True, 1024, False),
        (True, 1024, False),
        (False, 512, True),
        (True, 512, False),
        (True, 512, False),
    ]
    # Without loss scale nothing overflows, so the scale was to blame: no incident.
    assert trainer.progress.skipped_steps == 1 and not (run / "incidents.jsonl").exists()
    assert trainer.checkpoints.store.newest() == run / "checkpoints" / "step_5"


@pytest.mark.skipif(
    not get_accelerator().is_fp16_supported(), reason="this device does not compute in fp16"
)
@pytest.mark.parametrize(
    ("zero", "fp16", "last"),
    [
        (0, '"loss_scale": 1e9', 3),
        (1, '"initial_scale_power": 30, "min_loss_scale": 2.7e8, "hysteresis": 1', 5),
    ],
)
def test_fp16_whose_loss_scale_does_not_fall_far_enough_ends_with_code_6(
    zero: int, fp16: str, last: int, tiny: Tiny, tmp_path: Path, train: Command
) -> None:
    ds_config, run = tmp_path / "ds_config.json", tmp_path / "run"
    ds_config.write_text(
        f'{{"zero_optimization": {{"stage": {zero}}}, "fp16": {{"enabled": "auto", {fp16}}}}}'
    )
    settings = (
        "train.precision=fp16",
        "checkpoint.interval_steps=3",
        "guards.max_skipped_in_a_row=2",
        "model.num_hidden_layers=1",
    )
    code, message = train(
        [*tiny.arguments(run, *settings, steps=9, zero=None), "--ds_config", str(ds_config)]
    )
    assert (
        code == 6
        and f"error: 3 steps in a row up to step {last} were skipped, the last one because it overflows in fp16"
        in message
    )
    assert "set fp16.loss_scale to 0 in the ds_config" in message and "Traceback" not in message
    assert complete_checkpoints(run / "checkpoints") == []
