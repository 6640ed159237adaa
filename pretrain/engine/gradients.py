"""Whole gradients, wherever DeepSpeed's ZeRO stage keeps them."""

from __future__ import annotations

from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn


def full_gradient(parameter: nn.Parameter) -> Tensor | None:
    """The reduced gradient of a parameter, between the last backward pass and the update.

    Of an expert parameter, that of this rank's experts; None if it has none. It carries fp16's loss
    scale. Every rank must call it for the same parameters in the same order.
    """
    found: Tensor | None = safe_get_full_grad(parameter)
    return found
