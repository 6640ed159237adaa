"""The activation of gated feed-forwards as an operator of torch, computed by one kernel.

The plain forms are the ``activate`` of :mod:`pretrain.model.feed_forward`. Triton is imported when
it runs for the first time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from pretrain.model.kernels.selection import use_fused


def use_fused_gate(gate: Tensor, up: Tensor) -> bool:
    """Whether :func:`gated` computes with these products.

    Not inside ``torch.compile``, which fuses the plain form with what is around it.
    """
    return use_fused(gate) and gate.dtype == up.dtype and not torch.compiler.is_compiling()


@custom_op("pretrain::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor, alpha: float = 1.0, limit: float | None = None) -> Tensor:
    """g * sigmoid(alpha * g) * u of two products of one shape, in fp32 and rounded once.

    A second derivative is refused.

    Args:
        limit: clamps g from above and u from both sides; then u is increased by 1.
    """
    from pretrain.model.kernels import gated_triton

    return gated_triton.gated(gate, up, alpha, limit)


@custom_op("pretrain::gated_backward", mutates_args=())
def gated_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, alpha: float, limit: float | None
) -> tuple[Tensor, Tensor]:
    """The gradients of both products."""
    from pretrain.model.kernels import gated_triton

    return gated_triton.gated_backward(gradient, gate, up, alpha, limit)


@gated.register_fake
def _(gate: Tensor, up: Tensor, alpha: float = 1.0, limit: float | None = None) -> Tensor:
    return gate.new_empty(gate.shape)


@gated_backward.register_fake
def _(
    gradient: Tensor, gate: Tensor, up: Tensor, alpha: float, limit: float | None
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _keep_products(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.alpha, ctx.limit = inputs
    ctx.save_for_backward(gate, up)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return *gated_backward(gradient, *ctx.saved_tensors, ctx.alpha, ctx.limit), None, None


gated.register_autograd(_gradients, setup_context=_keep_products)
