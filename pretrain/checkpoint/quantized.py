"""Optimizer states of 8 bits: codes, and one scale for each block of 256 elements.

An element is ``levels[code] * scale``, with the scale of its block (Dettmers et al. 2022, "8-bit
Optimizers via Block-wise Quantization", section 2). Blocks are counted in the tensor that an
optimizer trains, which ZeRO may join of many parameters and cut anywhere, so the blocks of a
checkpoint and those of a run may differ. A block keeps its codes if all its elements have one
scale, even if the blocks of before were larger. Others are quantised anew, to the nearest level.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
# The scale of elements that belong to no parameter.
PADDING = -1.0


class Dequantized(NamedTuple):
    """Elements of a quantised state, flat.

    Attributes:
        values: [N] fp32.
        codes: [N] uint8; without meaning where ``scales`` is NaN.
        scales: [N] fp32, of each element's block; NaN for values that were never quantised.
    """

    values: Tensor
    codes: Tensor
    scales: Tensor


def expand(codes: Tensor, scales: Tensor, levels: Tensor, phase: int) -> Dequantized:
    """Return the values of codes.

    Args:
        codes: [N] uint8.
        scales: of the blocks that they are in.
        levels: [256] fp32.
        phase: the place of the first code in its block.
    """
    block = torch.arange(phase, phase + codes.numel(), device=codes.device) // BLOCK
    of_each = scales[block]
    return Dequantized(levels[codes.long()] * of_each, codes, of_each)


def never_quantized(values: Tensor) -> Dequantized:
    """Return values as elements that need to be quantised."""
    codes = torch.zeros_like(values, dtype=torch.uint8)
    return Dequantized(values, codes, torch.full(values.shape, torch.nan))


def quantize(elements: Dequantized, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [N] uint8 and the scale of each block of 256, fp32.

    Args:
        elements: those with the scale ``PADDING`` belong to no parameter.
        levels: [256] fp32, ascending.
    """
    count = elements.values.numel()
    blocks = -(-count // BLOCK)
    missing = blocks * BLOCK - count
    values, codes = (
        torch.nn.functional.pad(tensor, (0, missing)).view(blocks, BLOCK)
        for tensor in (elements.values, elements.codes)
    )
    scales = torch.nn.functional.pad(elements.scales, (0, missing), value=PADDING)
    scales = scales.view(blocks, BLOCK)
    # NaN is equal to nothing, so a block with values that were never quantised is quantised.
    counts = scales != PADDING
    smallest = torch.where(counts, scales, torch.inf).amin(1)
    largest = torch.where(counts, scales, -torch.inf).amax(1)
    keeps_codes = (smallest == largest) | ~counts.any(1)
    scale = torch.where(keeps_codes, largest.clamp_min(0.0), values.abs().amax(1))
    # The level nearest to x is found by the middles between neighbours.
    middles = (levels[1:] + levels[:-1]) / 2
    normed = values / torch.where(scale > 0, scale, 1.0)[:, None]
    anew = torch.bucketize(normed, middles).to(torch.uint8)
    # The codes of padding are those of zero: it must never enlarge the scale of its block.
    codes = torch.where(keeps_codes[:, None] & counts, codes, anew)
    return codes.flatten()[:count], scale
