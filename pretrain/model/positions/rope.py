"""Rotary position embedding (Su et al. 2021, RoFormer, eq. 34), half-split as in HF's Llama."""

from __future__ import annotations

import torch

from pretrain.model.config import ModelConfig
from pretrain.model.kernels.selection import use_fused
from pretrain.model.positions.config import RotaryBase
from pretrain.model.positions.interface import PositionEncoding, PositionTerms


def inverse_frequencies(rotary_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """The angle of each pair per position, radians: theta^(-2i/H), fp32 [H/2]."""
    return theta ** -(
        torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    )


def rope_tables(
    positions: torch.Tensor, frequencies: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position and pair times ``scale``, fp32.

    [S, H/2] for positions [S]; [B, 1, S, H/2] for positions [B, S].
    """
    # One table for all heads of a sequence.
    if positions.dim() == 2:
        positions = positions[:, None]
    # fp32: in bf16 positions above 256 would be rounded.
    angles = positions.float()[..., None] * frequencies
    return angles.cos() * scale, angles.sin() * scale


def apply_rope(x_BNSH: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate pair (x_i, x_{i+R/2}) of the last R elements of each head by its angle.

    R is twice the tables' width; elements before them stay as they are. Computed in fp32, returned
    in the input's dtype.
    """
    # Half-split, not interleaved: checkpoints of GPT-J's layout need their rows permuted.
    cos, sin = tables
    if use_fused(x_BNSH):
        from pretrain.model.kernels.rope_triton import rope

        return rope(x_BNSH, cos, sin, False)
    R = 2 * cos.shape[-1]
    if x_BNSH.shape[-1] > R:
        return torch.cat((x_BNSH[..., :-R], apply_rope(x_BNSH[..., -R:], tables)), dim=-1)
    first, second = x_BNSH.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(
        x_BNSH.dtype
    )


def apply_rope_to_both(
    q: torch.Tensor, k: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`apply_rope` of queries [B, N, S, H] and keys [B, M, S, H].

    Those of a single token are rotated together, in half as many operations.
    """
    if q.shape[2] > 1 or q.requires_grad:
        return apply_rope(q, tables), apply_rope(k, tables)
    rotated_q, rotated_k = apply_rope(torch.cat((q, k), dim=1), tables).split(
        (q.shape[1], k.shape[1]), dim=1
    )
    return rotated_q, rotated_k


class RopePosition(PositionEncoding):
    """Pairs of elements of queries and keys rotate by position * theta^(-2i/H)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        assert isinstance(model.position, RotaryBase)
        self.rotary_dim = model.attention.rotary_dim
        self.theta = model.position.rope_theta

    def terms(self, positions: torch.Tensor) -> PositionTerms:
        return PositionTerms(
            rope=rope_tables(
                positions, inverse_frequencies(self.rotary_dim, self.theta, positions.device)
            )
        )
