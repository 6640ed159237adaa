"""The activation of gated feed-forwards for CUDA, in Triton, both directions in one pass each.

h = g * sigmoid(alpha * g) * u, the SwiGLU of Shazeer 2020 with alpha 1; with a limit, gpt-oss':
g is clamped from above, u from both sides and increased by 1. All in fp32 registers, rounded once.
The backward pass reads the two products again and recomputes the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def gated_kernel(
    hidden: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    count: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    CLAMPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program computes BLOCK hidden units."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = place < count
    g = tl.load(gate + place, mask=is_there, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=is_there, other=0.0).to(tl.float32)
    if CLAMPED:
        # Comparisons, because tl.minimum would replace NaN by the limit.
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u)) + 1.0
    tl.store(hidden + place, g * tl.sigmoid(alpha * g) * u, mask=is_there)


@triton.jit
def gated_backward_kernel(
    gate_gradient: tl.tensor,
    up_gradient: tl.tensor,
    gradient: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    count: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    CLAMPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program computes the gradients of BLOCK elements of both products."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = place < count
    d = tl.load(gradient + place, mask=is_there, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=is_there, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=is_there, other=0.0).to(tl.float32)
    g_passes = is_there
    u_passes = is_there
    if CLAMPED:
        # At the limit itself the gradient passes, as through torch.clamp.
        g_passes = g <= limit
        u_passes = (u <= limit) & (u >= -limit)
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u)) + 1.0
    s = tl.sigmoid(alpha * g)
    g_gradient = d * u * s * (1.0 + alpha * g * (1.0 - s))
    u_gradient = d * g * s
    tl.store(gate_gradient + place, tl.where(g_passes, g_gradient, 0.0), mask=is_there)
    tl.store(up_gradient + place, tl.where(u_passes, u_gradient, 0.0), mask=is_there)


def gated(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float | None) -> torch.Tensor:
    """The hidden units of two products of one shape and dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    hidden = torch.empty_like(gate)
    count = hidden.numel()
    if count:
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(gate):
            gated_kernel[(triton.cdiv(count, BLOCK),)](
                hidden, gate, up, count, alpha, limit or 0.0, limit is not None, BLOCK
            )
    return hidden


def gated_backward(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    alpha: float,
    limit: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of both products."""
    gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
    gate_gradient, up_gradient = torch.empty_like(gate), torch.empty_like(up)
    count = gate.numel()
    if count:
        with torch.cuda.device_of(gate):
            gated_backward_kernel[(triton.cdiv(count, BLOCK),)](
                gate_gradient,
                up_gradient,
                gradient,
                gate,
                up,
                count,
                alpha,
                limit or 0.0,
                limit is not None,
                BLOCK,
            )
    return gate_gradient, up_gradient
