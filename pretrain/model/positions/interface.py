"""The interface of a kind of position encoding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from pretrain.model.config import ModelConfig


class PositionTerms(NamedTuple):
    """What attention needs of the positions of one call's tokens, computed once for all layers.

    Attributes:
        rope: cos and sin of every position and pair, fp32, to broadcast over [B, N, S, rotary_dim /
            2]; None if nothing is rotated.
        slopes_N: fp32 [N], ALiBi's penalty per token of distance; None without ALiBi.
        score_factor: multiplies the products of queries and keys, in addition to attention's own
            scale.
    """

    rope: tuple[torch.Tensor, torch.Tensor] | None = None
    slopes_N: torch.Tensor | None = None
    score_factor: float = 1.0


class PositionEncoding(nn.Module):
    """One kind of position encoding: what it adds to the embedding, and its terms for attention."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()

    def add(self, x_BSD: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The embedding with its positions, [S] or [B, S] int64, added; unchanged in most kinds."""
        return x_BSD

    def terms(self, positions: torch.Tensor) -> PositionTerms:
        """What attention needs for tokens at ``positions``, [S] or [B, S] int64."""
        return PositionTerms()
