"""The fp16 loss scale, which keeps small gradients from underflowing (Micikevicius et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from pretrain.engine.workarounds.stage0_fp16 import loss_scaler_of, scales_loss_itself

# What DeepSpeed's scalers count; at each ZeRO stage a scaler has some of these.
COUNTS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScale:
    """Reads and applies the loss scale, wherever DeepSpeed keeps it.

    It is 1 in all other precisions.

    Args:
        optimizer: the one that ``deepspeed.initialize`` returned.
    """

    def __init__(self, optimizer: Any, zero_stage: int, precision: str) -> None:
        self._optimizer = optimizer
        self._zero_stage = zero_stage
        self._is_fp16 = precision == "fp16"

    def value(self) -> float:
        """The scale that the next backward pass uses."""
        return float(self._scaler.cur_scale) if self._is_fp16 else 1.0

    def for_backward(self, loss: torch.Tensor) -> torch.Tensor:
        """The value to differentiate.

        If a loss is not finite, neither is any gradient: multiplying by one plus zero times the
        loss spreads its NaN, so every ZeRO stage sees it and skips the step. Otherwise an infinite
        loss may have a finite gradient.
        """
        loss = loss * (1.0 + 0.0 * loss.detach())
        if self._is_fp16 and not scales_loss_itself(self._zero_stage):
            return loss * self.value()
        return loss

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Set the scale to 1 inside the block."""
        if not self._is_fp16:
            yield
            return
        scaler = self._scaler
        scale = scaler.cur_scale
        scaler.cur_scale = 1.0
        try:
            yield
        finally:
            scaler.cur_scale = scale

    def state(self) -> dict[str, float]:
        """What a checkpoint holds of the scale; empty in all precisions but fp16."""
        if not self._is_fp16:
            return {}
        counts = {name: getattr(self._scaler, name, None) for name in COUNTS}
        return {name: count for name, count in counts.items() if count is not None}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue with the scale of a checkpoint, which may be one of another precision."""
        if self._is_fp16:
            for name in COUNTS:
                if name in state and hasattr(self._scaler, name):
                    setattr(self._scaler, name, state[name])

    @property
    def _scaler(self) -> Any:
        return loss_scaler_of(self._optimizer, self._zero_stage)
