"""Rotation of queries or keys in one pass: each element is read once and written once.

Liger Kernel's writes over its input, and in the backward pass over the gradient, which other nodes
of the graph may still read; and it rotates the first elements of a head, not the last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import custom_op

# Pairs of elements that a program rotates at once, and elements that it copies at once.
TILE = 2048


@triton.jit
def _rope_kernel(
    y_BNSH: tl.tensor,
    x_BNSH: tl.tensor,
    cos_BSP: tl.tensor,
    sin_BSP: tl.tensor,
    num_rows: tl.tensor,
    N: tl.tensor,
    S: tl.tensor,
    y_batch: tl.tensor,
    y_head: tl.tensor,
    y_token: tl.tensor,
    y_element: tl.tensor,
    x_batch: tl.tensor,
    x_head: tl.tensor,
    x_token: tl.tensor,
    x_element: tl.tensor,
    table_batch: tl.tensor,
    table_token: tl.tensor,
    KEPT: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INVERSE: tl.constexpr,
) -> None:
    """One program rotates ROWS heads of tokens; the first KEPT elements of a head are copied."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = (row < num_rows)[:, None]
    # 64 bits: a batch may have more than 2^31 elements.
    head = (row % N).to(tl.int64)
    token = ((row // N) % S).to(tl.int64)
    batch = (row // N // S).to(tl.int64)
    x_row = x_BNSH + (batch * x_batch + head * x_head + token * x_token)[:, None]
    y_row = y_BNSH + (batch * y_batch + head * y_head + token * y_token)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    is_pair = is_row & (pair < HALF)
    angle = (batch * table_batch + token * table_token)[:, None] + pair
    cos = tl.load(cos_BSP + angle, mask=is_pair, other=0.0)
    sin = tl.load(sin_BSP + angle, mask=is_pair, other=0.0)
    if INVERSE:
        sin = -sin
    first = tl.load(x_row + (KEPT + pair) * x_element, mask=is_pair, other=0.0).to(tl.float32)
    second = tl.load(x_row + (KEPT + HALF + pair) * x_element, mask=is_pair, other=0.0).to(
        tl.float32
    )
    tl.store(y_row + (KEPT + pair) * y_element, first * cos - second * sin, mask=is_pair)
    tl.store(y_row + (KEPT + HALF + pair) * y_element, second * cos + first * sin, mask=is_pair)
    for start in range(0, KEPT, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        is_there = is_row & (column < KEPT)
        kept = tl.load(x_row + column * x_element, mask=is_there, other=0.0)
        tl.store(y_row + column * y_element, kept, mask=is_there)


@custom_op("pretrain::rope", mutates_args=())
def rope(x_BNSH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    """Rotate the last R elements of each head; see ``apply_rope``, its plain reference.

    Args:
        x_BNSH: of any strides, fp32, bf16 or fp16; the result has its dtype.
        cos: fp32 [S, R / 2] or [B or 1, 1, S, R / 2], as ``sin``.
        inverse: rotate backwards, which is the gradient of the rotation.
    """
    y_BNSH = torch.empty_like(x_BNSH)
    if x_BNSH.numel() == 0:
        return y_BNSH
    B, N, S, H = x_BNSH.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    half = cos.shape[-1]
    per_sequence = cos.dim() == 4 and cos.shape[0] > 1
    pairs = triton.next_power_of_2(half)
    rows = max(TILE // pairs, 1)
    kept = H - 2 * half
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device_of(x_BNSH):
        _rope_kernel[(triton.cdiv(B * S * N, rows),)](
            y_BNSH,
            x_BNSH,
            cos,
            sin,
            B * S * N,
            N,
            S,
            *y_BNSH.stride(),
            *x_BNSH.stride(),
            S * half if per_sequence else 0,
            half,
            kept,
            half,
            rows,
            pairs,
            triton.next_power_of_2(max(min(kept, TILE // rows), 1)),
            inverse,
        )
    return y_BNSH


@rope.register_fake
def _(x_BNSH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    return torch.empty_like(x_BNSH)


def _keep_tables(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, gradient_BNSH):  # type: ignore[no-untyped-def]
    return rope(gradient_BNSH, *ctx.saved_tensors, not ctx.inverse), None, None, None


rope.register_autograd(_backward, setup_context=_keep_tables)
