"""One pre-norm block: attention, then a dense feed-forward or a mixture of experts."""

from __future__ import annotations

import torch
from torch import nn

from pretrain.config.schema import DeepSpeedMoE as DeepSpeedConfig
from pretrain.config.schema import DroplessMoE as DroplessConfig
from pretrain.config.schema import ModelConfig
from pretrain.model.attention.gqa import GroupedQueryAttention, LayerCache
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.mlp import SwiGLU
from pretrain.model.moe.interface import RouterStatistics, RoutingRecord
from pretrain.model.norm import RMSNorm


def build_moe(config: DroplessConfig | DeepSpeedConfig, hidden_size: int, ep_size: int, ep_rank: int) -> nn.Module:
    """The recipe's kind of MoE layer. Each kind's file is imported where it is chosen: both import DeepSpeed."""
    match config:
        case DroplessConfig():
            from pretrain.model.moe.dropless import DroplessMoE

            return DroplessMoE(config, hidden_size, ep_size, ep_rank)
        case DeepSpeedConfig():
            from pretrain.model.moe.native import DeepSpeedMoE

            return DeepSpeedMoE(config, hidden_size, ep_size, ep_rank)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, ep_size: int, ep_rank: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = GroupedQueryAttention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.is_moe_layer(layer)
        if self.is_moe:
            assert config.moe is not None
            self.feed_forward = build_moe(config.moe, config.hidden_size, ep_size, ep_rank)
        else:
            assert config.intermediate_size is not None
            self.feed_forward = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_BSD: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        mask: AttentionMask,
        cache: LayerCache | None = None,
        record: RoutingRecord | None = None,
        fractions_E: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RouterStatistics | None]:
        """[B, S, D] -> [B, S, D]; the statistics are those of the MoE layer, None in a dense block."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope, mask, cache)
        hidden_BSD = self.feed_forward_norm(x_BSD)
        if not self.is_moe:
            return x_BSD + self.feed_forward(hidden_BSD), None
        y_BSD, statistics = self.feed_forward(hidden_BSD, record, fractions_E)
        return x_BSD + y_BSD, statistics
