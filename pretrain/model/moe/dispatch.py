"""Moving tokens to their experts and back, and the permutations that this needs.

The plain form is ``x[token_of_row]`` with ``index_add`` as its backward pass. Here both directions
are gathers, the backward one by the inverse permutation: the same result without atomic additions,
so it is deterministic on every device. On CUDA :mod:`pretrain.model.kernels.rows` computes the same
with fewer passes over the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pretrain.model.kernels import rows
from pretrain.model.kernels.selection import use_fused

LARGEST_INT16 = (1 << 15) - 1


class _GatherTokens(torch.autograd.Function):
    """Row r of the result is token ``order[r] // top_k``.

    The backward pass gathers the k rows of each token and sums them.
    """

    @staticmethod
    def forward(ctx, x_TD, order_R, inverse_R, top_k):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse_R)
        ctx.top_k = top_k
        # Choice c of the flattened [T, K] ids belongs to token c // K.
        return x_TD.index_select(0, order_R // top_k)

    @staticmethod
    def backward(ctx, grad_RD):  # type: ignore[no-untyped-def]
        (inverse_R,) = ctx.saved_tensors
        # [R, D] in expert order -> [T, K, D]: row inverse[c] holds choice c.
        by_token = grad_RD.index_select(0, inverse_R).view(-1, ctx.top_k, grad_RD.shape[-1])
        return by_token.sum(dim=1), None, None, None


class _PermuteRows(torch.autograd.Function):
    """rows[order], for a permutation whose inverse is known."""

    @staticmethod
    def forward(ctx, rows_RD, order_R, inverse_R):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse_R)
        return rows_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx, grad_RD):  # type: ignore[no-untyped-def]
        (inverse_R,) = ctx.saved_tensors
        return grad_RD.index_select(0, inverse_R), None, None


class _Combine(torch.autograd.Function):
    """Keeps the rows as they are for the backward pass, instead of a copy in fp32."""

    @staticmethod
    def forward(ctx, rows_RD, order_R, inverse_R, weights_TK):  # type: ignore[no-untyped-def]
        rows_TKD = rows_RD.index_select(0, inverse_R).unflatten(0, weights_TK.shape)
        # Inputs, so that a second derivative is right too.
        ctx.save_for_backward(rows_RD, order_R, inverse_R, weights_TK)
        return torch.bmm(weights_TK[:, None], rows_TKD.float())[:, 0].to(rows_RD.dtype)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        rows_RD, order_R, inverse_R, weights_TK = ctx.saved_tensors
        rows_TKD = rows_RD.index_select(0, inverse_R).unflatten(0, weights_TK.shape)
        # In the order of the experts at once. fp32 weights make an fp32 product; in place it is
        # rounded without being stored in fp32.
        rows_gradient_RD = grad_TD.index_select(0, order_R // weights_TK.shape[1])
        rows_gradient_RD.mul_(weights_TK.reshape(-1)[order_R][:, None])
        rows_TDK = rows_TKD.float().transpose(1, 2)
        weights_gradient_TK = torch.bmm(grad_TD.float()[:, None], rows_TDK)[:, 0]
        return rows_gradient_RD, None, None, weights_gradient_TK


class Grouping(NamedTuple):
    """The permutation that makes each expert's rows neighbours.

    Attributes:
        order_R: the place before of each row after, int64.
        inverse_R: the place after of each row before, int64.
        counts_E: rows of each expert, int64.
    """

    order_R: torch.Tensor
    inverse_R: torch.Tensor
    counts_E: torch.Tensor


def group_rows(ids_R: torch.Tensor, num_experts: int) -> Grouping:
    """Group rows by the expert of each, ``ids_R`` int64, without a wait for the device.

    Stable, so that the order of an expert's rows, and with it the rounding of its gradient, is
    fixed.
    """
    # A radix sort makes a pass over all rows for each byte or so of its keys.
    keys_R = ids_R.to(torch.int16) if num_experts <= LARGEST_INT16 else ids_R
    sorted_R, order_R = keys_R.sort(stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    # Where each expert's rows end. bincount would count too, but copies two values to the host
    # first.
    experts_E = torch.arange(num_experts, dtype=sorted_R.dtype, device=sorted_R.device)
    ends_E = torch.searchsorted(sorted_R, experts_E, right=True)
    return Grouping(order_R, inverse_R, ends_E.diff(prepend=ends_E.new_zeros(1)))


def gather_tokens(
    x_TD: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor, top_k: int
) -> torch.Tensor:
    """[T, D] -> [T * K, D]: each token once per choice, in the order of the chosen experts."""
    if use_fused(x_TD):
        return rows.gather_tokens(x_TD, order_R, inverse_R, top_k)
    return _GatherTokens.apply(x_TD, order_R, inverse_R, top_k)


def permute_rows(
    rows_RD: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor
) -> torch.Tensor:
    """rows[order] with a gather as its backward pass."""
    return _PermuteRows.apply(rows_RD, order_R, inverse_R)


def combine(
    rows_RD: torch.Tensor,
    *,
    order_R: torch.Tensor,
    inverse_R: torch.Tensor,
    weights_TK: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of each token's K rows: [T * K, D] in expert order -> [T, D].

    Accumulated in fp32, returned in the rows' dtype.
    """
    if use_fused(rows_RD):
        return rows.combine(rows_RD, inverse_R, weights_TK)
    return _Combine.apply(rows_RD, order_R, inverse_R, weights_TK)


def group_arrived(counts_Pe: torch.Tensor, num_rows: int) -> Grouping:
    """Group rows by local expert after the exchange.

    They arrive source rank by source rank, each sorted by expert.

    Args:
        counts_Pe: rows from each source rank for each local expert, [ep_size, e].
        num_rows: their sum, known on the host.
    """
    ep_size, num_local = counts_Pe.shape
    expert_of_block = torch.arange(num_local, device=counts_Pe.device).repeat(ep_size)
    # output_size spares repeat_interleave a synchronisation with the device.
    expert_R = expert_of_block.repeat_interleave(counts_Pe.reshape(-1), output_size=num_rows)
    return group_rows(expert_R, num_local)
