"""Tokens' rows to their experts and back as operators of torch, each computed by one kernel.

The plain forms are in :mod:`pretrain.model.moe.dispatch`. As operators of torch they are single
nodes of a compiled graph. Triton is imported when the first one runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.library import custom_op


@custom_op("pretrain::gather_tokens", mutates_args=())
def gather_tokens(x_TD: Tensor, order_R: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    """Row r is token ``order_R[r] // top_k``: [T, D] -> [R, D], differentiable any number of times.

    Args:
        inverse_R: of ``order_R``; the backward pass sums by it.
    """
    from pretrain.model.kernels import rows_triton

    return rows_triton.gather(x_TD, order_R, top_k)


@custom_op("pretrain::sum_choices", mutates_args=())
def sum_choices(rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    """The derivative of :func:`gather_tokens`: each token's rows, added in fp32 and rounded once.

    [R, D] -> [T, D].
    """
    from pretrain.model.kernels import rows_triton

    return rows_triton.combine(rows_RD, inverse_R, top_k, None)


@custom_op("pretrain::combine", mutates_args=())
def combine(rows_RD: Tensor, inverse_R: Tensor, weights_TK: Tensor) -> Tensor:
    """The weighted sum of each token's rows, in fp32 and rounded once: [R, D] -> [T, D].

    A second derivative is refused.

    Args:
        weights_TK: fp32.
    """
    from pretrain.model.kernels import rows_triton

    return rows_triton.combine(rows_RD, inverse_R, weights_TK.shape[1], weights_TK)


@custom_op("pretrain::combine_backward", mutates_args=())
def combine_backward(
    gradient_TD: Tensor, rows_RD: Tensor, inverse_R: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the rows [R, D], in the rows' dtype, and of the weights [T, K], fp32."""
    from pretrain.model.kernels import rows_triton

    return rows_triton.combine_backward(gradient_TD, rows_RD, inverse_R, weights_TK)


@gather_tokens.register_fake
def _(x_TD: Tensor, order_R: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    return x_TD.new_empty(order_R.shape[0], x_TD.shape[1])


@sum_choices.register_fake
def _(rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    return rows_RD.new_empty(inverse_R.shape[0] // top_k, rows_RD.shape[1])


@combine.register_fake
def _(rows_RD: Tensor, inverse_R: Tensor, weights_TK: Tensor) -> Tensor:
    return rows_RD.new_empty(weights_TK.shape[0], rows_RD.shape[1])


@combine_backward.register_fake
def _(
    gradient_TD: Tensor, rows_RD: Tensor, inverse_R: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    return rows_RD.new_empty(rows_RD.shape), weights_TK.new_empty(weights_TK.shape)


def _keep_permutation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, order_R, inverse_R, ctx.top_k = inputs
    ctx.save_for_backward(order_R, inverse_R)


def _sum_gradients(ctx: Any, gradient_RD: Tensor) -> tuple[Any, ...]:
    return sum_choices(gradient_RD, *ctx.saved_tensors, ctx.top_k), None, None, None


def _gather_gradients(ctx: Any, gradient_TD: Tensor) -> tuple[Any, ...]:
    return gather_tokens(gradient_TD, *ctx.saved_tensors, ctx.top_k), None, None, None


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_gradients(ctx: Any, gradient_TD: Tensor) -> tuple[Any, ...]:
    rows_gradient_RD, weights_gradient_TK = combine_backward(gradient_TD, *ctx.saved_tensors)
    return rows_gradient_RD, None, weights_gradient_TK


gather_tokens.register_autograd(_sum_gradients, setup_context=_keep_permutation)
sum_choices.register_autograd(_gather_gradients, setup_context=_keep_permutation)
combine.register_autograd(_combine_gradients, setup_context=_keep_inputs)
