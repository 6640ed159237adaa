"""Experts that see every token, in parallel to the routed ones.

Rajbhandari et al. 2022; Dai et al. 2024, DeepSeekMoE.
"""

from __future__ import annotations

import torch
from torch import nn

from pretrain.model.config import ModelConfig


class SharedExperts(nn.Module):
    """All shared experts as one feed-forward of their joint width.

    Its output is multiplied by sigmoid(w x) if the recipe asks for the gate.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        moe = model.moe
        assert moe is not None
        kind = model.feed_forward.implementing_class()
        # One wide feed-forward is the sum of several narrow ones, in a single product.
        self.feed_forward = kind(
            model.feed_forward, model.hidden_size, moe.shared_width, model.dropout.feed_forward
        )
        self.gate = nn.Linear(model.hidden_size, 1, bias=False) if moe.shared_expert_gate else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        y = self.feed_forward(x)
        return y if self.gate is None else y * torch.sigmoid(self.gate(x))


def shared_experts(model: ModelConfig) -> SharedExperts | None:
    """The recipe's shared experts, if it has any."""
    return SharedExperts(model) if model.moe is not None and model.moe.num_shared_experts else None
