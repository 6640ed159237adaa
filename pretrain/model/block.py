"""One block: attention, then a dense feed-forward or a mixture of experts.

Each half has its own norm and residual connection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pretrain.core.errors import ConfigError
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.config import ModelConfig
from pretrain.model.moe.base import RouterStatistics, RoutingRecord
from pretrain.model.moe.shared_experts import SharedExperts
from pretrain.model.positions.interface import PositionTerms
from pretrain.model.token_parallel import TensorParallel


class Block(nn.Module):
    """Pre-norm: x + f(norm(x)). Post-norm: norm(x + f(x)) (Xiong et al. 2020, fig. 1).

    f is attention in the first half and the feed-forward in the second.
    """

    def __init__(self, config: ModelConfig, layer: int, ep_size: int, ep_rank: int) -> None:
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.dropout = config.dropout.residual
        norm = config.norm.implementing_class()
        self.attention_norm = norm(config.hidden_size, config.norm.eps)
        self.attention = config.attention.implementing_class()(config, layer)
        self.feed_forward_norm = norm(config.hidden_size, config.norm.eps)
        self._tensor: TensorParallel | None = None
        self.is_moe = config.layer_pattern.is_moe(layer)
        if self.is_moe:
            assert config.moe is not None
            self.feed_forward = config.moe.implementing_class()(config, ep_size, ep_rank)
        else:
            assert config.intermediate_size is not None
            dense = config.feed_forward.implementing_class()
            self.feed_forward = dense(
                config.feed_forward,
                config.hidden_size,
                config.intermediate_size,
                config.dropout.feed_forward,
            )

    def share(self, tensor: TensorParallel) -> None:
        """Keep this rank's heads, and its hidden units of feed-forwards that see every token."""
        self._tensor = tensor
        if not hasattr(self.attention, "share"):
            raise ConfigError(
                f"parallel.tp_size is {tensor.parts}, but {type(self.attention).__name__} has no "
                "method share(tensor) that keeps a rank's heads: use parallel.sp_size"
            )
        self.attention.share(tensor)
        for module in self.feed_forward.modules():
            if isinstance(module, SharedExperts):
                module.feed_forward.share(tensor)
        if not self.is_moe:
            self.feed_forward.share(tensor)

    def forward(
        self,
        x_BSD: torch.Tensor,
        positions: PositionTerms,
        mask: AttentionMask,
        cache: Any = None,
        record: RoutingRecord | None = None,
        fractions_E: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RouterStatistics | None]:
        """[B, S, D] -> [B, S, D] and the statistics of the MoE layer (None in a dense block).

        ``cache`` is the layer's own key/value cache.
        """
        x_BSD = self.attend(x_BSD, positions, mask, cache)
        # Post-norm applies the same norm after the residual instead, below.
        hidden_BSD = self.feed_forward_norm(x_BSD) if self.pre_norm else x_BSD
        y_BSD, statistics = (
            self.feed_forward(hidden_BSD, record, fractions_E)
            if self.is_moe
            else (self.feed_forward(hidden_BSD), None)
        )
        x_BSD = x_BSD + self._dropped(y_BSD)
        return x_BSD if self.pre_norm else self.feed_forward_norm(x_BSD), statistics

    def attend(
        self, x_BSD: torch.Tensor, positions: PositionTerms, mask: AttentionMask, cache: Any = None
    ) -> torch.Tensor:
        """The first half: attention with its norm and residual, [B, S, D] -> [B, S, D].

        A method of its own, because ``torch.compile`` is applied to it alone in MoE blocks.
        """
        hidden_BSD = self.attention_norm(x_BSD) if self.pre_norm else x_BSD
        if self._tensor is not None:
            hidden_BSD = self._tensor.gather(hidden_BSD, dim=1)
        y_BSD = self.attention(hidden_BSD, positions, mask, cache)
        if self._tensor is not None:
            y_BSD = self._tensor.scatter_sum(y_BSD, dim=1)
        x_BSD = x_BSD + self._dropped(y_BSD)
        return x_BSD if self.pre_norm else self.attention_norm(x_BSD)

    def _dropped(self, y_BSD: torch.Tensor) -> torch.Tensor:
        return functional.dropout(y_BSD, self.dropout, self.training)
