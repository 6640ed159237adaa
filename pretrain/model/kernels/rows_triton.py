"""Tokens' rows to their experts and back for CUDA, in Triton (Tillet et al. 2019).

T tokens of D elements, K choices of each: R = T * K rows in the order of their experts. Row
``inverse_R[t * K + k]`` is choice k of token t. Sums are over k in order, in fp32 registers, and
nothing is added atomically: the same bits each time. Addresses are 64 bits wide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements that a program reads at once, and at most how many of them are of one row.
TILE = 4096
MOST_COLUMNS = 512


@triton.jit
def gather_kernel(
    rows_RD: tl.tensor,
    x_TD: tl.tensor,
    order_R: tl.tensor,
    num_rows: tl.tensor,
    K: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program writes ROWS rows: row r is token ``order_R[r] // K``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    token = tl.load(order_R + row, mask=is_row, other=0) // K
    for first in range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        is_there = is_row[:, None] & (column < D)
        tile = tl.load(x_TD + token[:, None] * D + column, mask=is_there)
        tl.store(rows_RD + row[:, None] * D + column, tile, mask=is_there)


@triton.jit
def combine_kernel(
    y_TD: tl.tensor,
    rows_RD: tl.tensor,
    inverse_R: tl.tensor,
    weights_TK: tl.tensor,
    num_tokens: tl.tensor,
    K: tl.constexpr,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program writes TOKENS sums of K rows each, weighted or not."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    for first in range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        is_there = is_token[:, None] & (column < D)
        sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
        for k in range(K):
            row = tl.load(inverse_R + token * K + k, mask=is_token, other=0)
            tile = tl.load(rows_RD + row[:, None] * D + column, mask=is_there, other=0.0)
            if WEIGHTED:
                weight = tl.load(weights_TK + token * K + k, mask=is_token, other=0.0)
                sums += weight[:, None] * tile.to(tl.float32)
            else:
                sums += tile.to(tl.float32)
        tl.store(y_TD + token[:, None] * D + column, sums, mask=is_there)


@triton.jit
def combine_backward_kernel(
    rows_gradient_RD: tl.tensor,
    weights_gradient_TK: tl.tensor,
    gradient_TD: tl.tensor,
    rows_RD: tl.tensor,
    inverse_R: tl.tensor,
    weights_TK: tl.tensor,
    num_tokens: tl.tensor,
    K: tl.constexpr,
    D: tl.constexpr,
    CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program reads TOKENS gradients once and writes those of their rows and weights.

    CHOICES is the power of two that K fits into.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < num_tokens
    choice = tl.arange(0, CHOICES)[None, :]
    dots = tl.zeros((TOKENS, CHOICES), tl.float32)
    for first in range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        is_there = is_token[:, None] & (column < D)
        place = token[:, None] * D + column
        gradient = tl.load(gradient_TD + place, mask=is_there, other=0.0).to(tl.float32)
        for k in range(K):
            row = tl.load(inverse_R + token * K + k, mask=is_token, other=0)
            weight = tl.load(weights_TK + token * K + k, mask=is_token, other=0.0)
            place = row[:, None] * D + column
            tile = tl.load(rows_RD + place, mask=is_there, other=0.0).to(tl.float32)
            tl.store(rows_gradient_RD + place, gradient * weight[:, None], mask=is_there)
            dots += tl.where(choice == k, tl.sum(gradient * tile, axis=1)[:, None], 0.0)
    place = token[:, None] * K + choice
    tl.store(weights_gradient_TK + place, dots, mask=is_token[:, None] & (choice < K))


def _tile(D: int) -> tuple[int, int]:
    """Rows and columns that a program reads at once, both powers of two."""
    columns = min(max(triton.next_power_of_2(D), 32), MOST_COLUMNS)
    return TILE // columns, columns


def gather(x_TD: torch.Tensor, order_R: torch.Tensor, top_k: int) -> torch.Tensor:
    """Row r is token ``order_R[r] // top_k``: [T, D] -> [R, D]."""
    x_TD, order_R = x_TD.contiguous(), order_R.contiguous()
    R, D = order_R.numel(), x_TD.shape[1]
    rows_RD = x_TD.new_empty(R, D)
    if rows_RD.numel():
        rows, columns = _tile(D)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(x_TD):
            gather_kernel[(triton.cdiv(R, rows),)](
                rows_RD, x_TD, order_R, R, top_k, D, rows, columns
            )
    return rows_RD


def combine(
    rows_RD: torch.Tensor, inverse_R: torch.Tensor, top_k: int, weights_TK: torch.Tensor | None
) -> torch.Tensor:
    """The sum of each token's rows, weighted in fp32 or not: [R, D] -> [T, D]."""
    rows_RD, inverse_R = rows_RD.contiguous(), inverse_R.contiguous()
    T, D = inverse_R.numel() // top_k, rows_RD.shape[1]
    y_TD = rows_RD.new_empty(T, D)
    if y_TD.numel():
        tokens, columns = _tile(D)
        # The kernel reads no weights if there are none; any pointer will do.
        weights_TK = rows_RD if weights_TK is None else weights_TK.contiguous()
        with torch.cuda.device_of(rows_RD):
            combine_kernel[(triton.cdiv(T, tokens),)](
                y_TD,
                rows_RD,
                inverse_R,
                weights_TK,
                T,
                top_k,
                D,
                weights_TK is not rows_RD,
                tokens,
                columns,
            )
    return y_TD


def combine_backward(
    gradient_TD: torch.Tensor,
    rows_RD: torch.Tensor,
    inverse_R: torch.Tensor,
    weights_TK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the rows [R, D], in their order, and of the weights [T, K]."""
    gradient_TD, rows_RD = gradient_TD.contiguous(), rows_RD.contiguous()
    inverse_R, weights_TK = inverse_R.contiguous(), weights_TK.contiguous()
    T, K = weights_TK.shape
    D = rows_RD.shape[1]
    rows_gradient_RD, weights_gradient_TK = torch.empty_like(rows_RD), torch.empty_like(weights_TK)
    if rows_RD.numel():
        tokens, columns = _tile(D)
        with torch.cuda.device_of(rows_RD):
            combine_backward_kernel[(triton.cdiv(T, tokens),)](
                rows_gradient_RD,
                weights_gradient_TK,
                gradient_TD,
                rows_RD,
                inverse_R,
                weights_TK,
                T,
                K,
                D,
                triton.next_power_of_2(K),
                tokens,
                columns,
            )
    return rows_gradient_RD, weights_gradient_TK
