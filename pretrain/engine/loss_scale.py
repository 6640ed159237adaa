"""The fp16 loss scale, which keeps small gradients from underflowing (Micikevicius et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pretrain.engine.workarounds.stage0_fp16 import loss_scaler_of, scales_loss_itself


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

    @property
    def _scaler(self) -> Any:
        # Looked up each time: loading a checkpoint replaces the object.
        return loss_scaler_of(self._optimizer, self._zero_stage)
