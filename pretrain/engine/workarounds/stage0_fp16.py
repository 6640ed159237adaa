"""The fp16 loss scale at ZeRO stage 0.

Fact: at stage 0 DeepSpeed's fp16 optimizer divides gradients by the loss scale, but the engine's
    ``backward`` does not multiply the loss by it, as it does at stages 1 to 3; and the optimizer
    keeps the scale under another name, ``loss_scale_config``.
Versions: 0.19.8
Upstream: none known
Effect: gradients would be too small by the loss scale: the model would hardly train.
Test: tests/integration/engine/test_deepspeed_facts.py::test_stage_0_does_not_scale_an_fp16_loss
"""

from __future__ import annotations

from typing import Any


def scales_loss_itself(zero_stage: int) -> bool:
    """Whether ``DeepSpeedEngine.backward`` multiplies an fp16 loss by the loss scale."""
    return zero_stage > 0


def loss_scaler_of(optimizer: Any, zero_stage: int) -> Any:
    """The object whose ``cur_scale`` is the fp16 loss scale."""
    return optimizer.loss_scale_config if zero_stage == 0 else optimizer.loss_scaler
