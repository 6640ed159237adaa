"""Moving tokens to their experts and back, and the permutations that this needs.

The plain form is ``x[token_of_row]`` with ``index_add`` as its backward pass. Here both directions
are gathers, the backward one by the inverse permutation: the same result without atomic additions,
so it is deterministic on every device.
"""

from __future__ import annotations

import torch


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


def sort_order(keys_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The stable sorting permutation of ``keys_R`` and its inverse, both [R] int64.

    Stable, so that the order of an expert's rows, and with it the rounding of its gradient, is
    fixed.
    """
    order_R = keys_R.argsort(stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return order_R, inverse_R


def gather_tokens(
    x_TD: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor, top_k: int
) -> torch.Tensor:
    """[T, D] -> [T * K, D]: each token once per choice, in the order of the chosen experts."""
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
    T, K = weights_TK.shape
    # The inverse comes first: this is the way back from expert order to token order.
    rows_TKD = permute_rows(rows_RD, inverse_R, order_R).view(T, K, -1)
    return torch.bmm(weights_TK[:, None], rows_TKD.float())[:, 0].to(rows_RD.dtype)


def group_by_expert(counts_Pe: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The permutation, and its inverse, from order of arrival to rows grouped by local expert.

    After the exchange, rows arrive source rank by source rank, each sorted by expert.

    Args:
        counts_Pe: rows from each source rank for each local expert, [ep_size, e].
        num_rows: their sum, known on the host.
    """
    ep_size, num_local = counts_Pe.shape
    expert_of_block = torch.arange(num_local, device=counts_Pe.device).repeat(ep_size)
    # output_size spares repeat_interleave a synchronisation with the device.
    expert_R = expert_of_block.repeat_interleave(counts_Pe.reshape(-1), output_size=num_rows)
    return sort_order(expert_R)
