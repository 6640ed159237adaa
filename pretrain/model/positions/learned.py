"""Learned absolute positions (Vaswani et al. 2017, section 3.5; GPT-2)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from pretrain.model.config import ModelConfig
from pretrain.model.positions.interface import PositionEncoding


class LearnedPosition(PositionEncoding):
    """Row p of ``weight`` [max_position_embeddings, D] is added to the embedding at position p."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.weight = nn.Parameter(torch.empty(model.max_position_embeddings, model.hidden_size))

    def add(self, x_BSD: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return x_BSD + functional.embedding(positions, self.weight)
