"""Attention with linear biases (Press et al. 2022), alone or with a rotary embedding."""

from __future__ import annotations

import torch

from pretrain.model.config import ModelConfig
from pretrain.model.positions.interface import PositionEncoding, PositionTerms
from pretrain.model.positions.rope import RopePosition


def alibi_slopes(num_heads: int, device: torch.device) -> torch.Tensor:
    """The slope of each head, fp32 [N], all above 0: a score loses it per token of distance.

    2^(-8/N), 2^(-16/N) ... 2^-8 for a power of two; any other number of heads has the slopes of the
    next lower power of two, then every second one of the next higher.
    """

    def geometric(count: int) -> torch.Tensor:
        return 2.0 ** (
            torch.arange(1, count + 1, dtype=torch.float32, device=device) * (-8.0 / count)
        )

    lower = 1 << (num_heads.bit_length() - 1)
    return torch.cat((geometric(lower), geometric(2 * lower)[::2][: num_heads - lower]))


class AlibiPosition(PositionEncoding):
    """A key n tokens back gets -slope * n.

    Distances are counted in tokens of the sequence, so that document resets change nothing.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.num_heads = model.attention.num_attention_heads

    def terms(self, positions: torch.Tensor) -> PositionTerms:
        return PositionTerms(slopes_N=alibi_slopes(self.num_heads, positions.device))


class RopeAlibiPosition(RopePosition):
    """Rotated queries and keys, and ALiBi's penalty on their scores."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.num_heads = model.attention.num_attention_heads

    def terms(self, positions: torch.Tensor) -> PositionTerms:
        return (
            super()
            .terms(positions)
            ._replace(slopes_N=alibi_slopes(self.num_heads, positions.device))
        )
