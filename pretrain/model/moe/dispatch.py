"""Moving tokens to their experts and back, and the permutations that this needs.

The plain form is ``x[token_of_row]`` with ``index_add`` as its backward pass. Here both directions
are gathers, the backward one by the inverse permutation: the same result without atomic additions,
so it is deterministic on every device. On CUDA :mod:`pretrain.model.kernels.rows` computes the same
with fewer passes over the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

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


class Spread(NamedTuple):
    """Which of T items each of R rows is a copy of, and in the other direction an item's rows.

    Attributes:
        item_R: the item of each row, int64.
        rows_R: the rows, those of the first item first.
        starts_T: where each item's rows start in ``rows_R``.
    """

    item_R: torch.Tensor
    rows_R: torch.Tensor
    starts_T: torch.Tensor

    def sum(self, rows_RD: torch.Tensor) -> torch.Tensor:
        """The sum of each item's rows, [T, D] fp32, in the order of ``rows_R``."""
        return functional.embedding_bag(self.rows_R, rows_RD.float(), self.starts_T, mode="sum")


class _SpreadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, spread):  # type: ignore[no-untyped-def]
        ctx.spread = spread
        return x_TD.index_select(0, spread.item_R)

    @staticmethod
    def backward(ctx, grad_RD):  # type: ignore[no-untyped-def]
        return ctx.spread.sum(grad_RD).to(grad_RD.dtype), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, weights_R1, spread):  # type: ignore[no-untyped-def]
        ctx.spread = spread
        # Without weights the rows are not needed: their gradient is a copy.
        ctx.save_for_backward(*(() if weights_R1 is None else (rows_RD, weights_R1)))
        weighted_RD = rows_RD if weights_R1 is None else rows_RD.float() * weights_R1
        return spread.sum(weighted_RD).to(rows_RD.dtype)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        grad_RD = grad_TD.index_select(0, ctx.spread.item_R)
        # Once: a checkpointed block's tensors may be asked for no second time.
        saved = ctx.saved_tensors
        if not saved:
            return grad_RD, None, None
        rows_RD, weights_R1 = saved
        weights_gradient_R1 = (grad_RD.float() * rows_RD.float()).sum(dim=1, keepdim=True)
        # fp32 weights make an fp32 product.
        return (grad_RD * weights_R1).to(rows_RD.dtype), weights_gradient_R1, None


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


def spread_rows(x_TD: torch.Tensor, spread: Spread) -> torch.Tensor:
    """x[item], with a sum in a fixed order as its backward pass: [T, D] -> [R, D]."""
    return _SpreadRows.apply(x_TD, spread)


def sum_rows(
    rows_RD: torch.Tensor, spread: Spread, weights_R1: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum of each item's rows: [R, D] -> [T, D], in the rows' dtype.

    Accumulated in fp32.

    Args:
        weights_R1: fp32 factor of each row.
    """
    return _SumRows.apply(rows_RD, weights_R1, spread)


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
