"""Token embedding, optionally factorised; the head reuses its projection."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from pretrain.model.config import ModelConfig
from pretrain.model.tensor_shards import cut, embed_shard
from pretrain.model.token_parallel import TensorParallel


class TokenEmbedding(nn.Module):
    """Rows of ``weight`` [padded vocabulary, e], projected to the hidden size if e is smaller.

    The factorisation is that of ALBERT (Lan et al. 2020, section 3.1).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.embedding_size or config.hidden_size
        # A bare parameter, which a tied head can share; uninitialised until ``init`` fills it.
        self.weight = nn.Parameter(torch.empty(config.padded_vocab_size, size))
        self.projection = (
            nn.Parameter(torch.empty(config.hidden_size, size)) if config.embedding_size else None
        )
        self._tensor: TensorParallel | None = None

    @property
    def size(self) -> int:
        """Elements of one row, e."""
        return self.weight.shape[1]

    def share(self, tensor: TensorParallel) -> None:
        """Keep this rank's rows."""
        self._tensor = tensor
        cut(self, "weight", 0, tensor)

    def forward(self, input_ids_BS: torch.Tensor) -> torch.Tensor:
        """Token ids [B, S] -> [B, S, D]."""
        if self._tensor is None:
            x = functional.embedding(input_ids_BS, self.weight)
        else:
            x = embed_shard(self.weight, input_ids_BS, self._tensor)
        return x if self.projection is None else functional.linear(x, self.projection)

    def reduce(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, e] by the transposed projection: what the head multiplies."""
        return x_BSD if self.projection is None else x_BSD @ self.projection
