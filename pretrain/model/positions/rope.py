"""Rotary position embedding (Su et al. 2021, RoFormer, eq. 34), half-split as in Hugging Face's Llama."""

from __future__ import annotations

import torch


def rope_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position and pair, each [..., H/2] in fp32 for positions [...]; pair i turns by position * theta^(-2i/H)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[..., None] / theta**exponents
    return angles.cos(), angles.sin()


def apply_rope(x_BNSH: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns pair (x_i, x_{i+H/2}) of each head by its angle. Computed in fp32, returned in the input's dtype."""
    cos, sin = tables
    first, second = x_BNSH.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BNSH.dtype)
