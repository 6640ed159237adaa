"""Grouped-query attention and its key/value cache."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from pretrain.model.attention.config import GroupedQueryAttentionConfig
from pretrain.model.attention.kernels.base import attention_kernel
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.attention.scores import Scores
from pretrain.model.attention.split_heads import attend
from pretrain.model.config import ModelConfig
from pretrain.model.norm import RMSNorm
from pretrain.model.positions.interface import PositionTerms
from pretrain.model.positions.rope import apply_rope_to_both
from pretrain.model.tensor_shards import cut, cut_columns, cut_rows, own_rows
from pretrain.model.token_parallel import TensorParallel


class KeyValueCache:
    """Keys and values of one layer: two [B, M, max_tokens, H] tensors, filled from the left."""

    def __init__(
        self, shape: tuple[int, int, int, int], device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def append(
        self, k_BMSH: torch.Tensor, v_BMSH: torch.Tensor, offset: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values after ``offset`` tokens; all of them, [B, M, offset + S, H]."""
        added = k_BMSH.shape[2]
        self.keys.narrow(2, offset, added).copy_(k_BMSH)
        self.values.narrow(2, offset, added).copy_(v_BMSH)
        return self.keys.narrow(2, 0, offset + added), self.values.narrow(2, 0, offset + added)


class GroupedQueryAttention(nn.Module):
    """N query heads share M key/value heads (Ainslie et al. 2023).

    Queries and keys may have an RMSNorm before their rotation.
    """

    def __init__(self, model: ModelConfig, layer: int) -> None:
        super().__init__()
        config = cast(GroupedQueryAttentionConfig, model.attention)
        self.config = config
        self.window = config.window(layer)
        self.dropout = model.dropout.attention
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(model.hidden_size, queries, bias=config.bias != "none")
        self.k_proj = nn.Linear(model.hidden_size, keys, bias=config.bias != "none")
        self.v_proj = nn.Linear(model.hidden_size, keys, bias=config.bias != "none")
        self.o_proj = nn.Linear(queries, model.hidden_size, bias=config.bias == "all")
        sizes = {"none": None, "head": (config.head_dim, config.head_dim), "full": (queries, keys)}[
            config.qk_norm
        ]
        self.q_norm = RMSNorm(sizes[0], model.norm.eps) if sizes else None
        self.k_norm = RMSNorm(sizes[1], model.norm.eps) if sizes else None
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads)) if config.sinks else None
        self._key_rows: slice | None = None
        # On the meta device a model is only counted: the kernel's package may be missing then.
        self.kernel = attention_kernel(config.kernel, self.q_proj.weight.device)

    def share(self, tensor: TensorParallel) -> None:
        """Keep this rank's heads; key heads are whole on every rank if there are fewer than ranks.

        Their gradients are then the sums of what each rank's heads add.
        """
        cut_columns(tensor, self.q_proj)
        cut_rows(tensor, self.o_proj)
        if self.sinks is not None:
            cut(self, "sinks", 0, tensor)
        heads, size = self.config.num_key_value_heads, self.config.head_dim
        if heads % tensor.parts == 0:
            cut_columns(tensor, self.k_proj, self.v_proj)
        else:
            first = tensor.part * heads // tensor.parts * size
            self._key_rows = slice(first, first + size)

    def new_cache(
        self, batch_size: int, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> KeyValueCache:
        """An empty cache of this layer."""
        return KeyValueCache(
            (batch_size, self.config.num_key_value_heads, max_tokens, self.config.head_dim),
            device,
            dtype,
        )

    def forward(
        self,
        x_BSD: torch.Tensor,
        positions: PositionTerms,
        mask: AttentionMask,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]; ``positions`` are the terms of these S tokens."""
        B, S, _ = x_BSD.shape
        q_BNSH = self._heads(self.q_proj(x_BSD), self.q_norm)
        k_BSX, v_BSX = (
            linear(x_BSD) if self._key_rows is None else own_rows(linear, x_BSD, self._key_rows)
            for linear in (self.k_proj, self.v_proj)
        )
        k_BMSH, v_BMSH = self._heads(k_BSX, self.k_norm), self._heads(v_BSX, None)
        if positions.rope is not None:
            q_BNSH, k_BMSH = apply_rope_to_both(q_BNSH, k_BMSH, positions.rope)
        # Keys are cached rotated: their positions never change.
        if cache is not None:
            k_BMSH, v_BMSH = cache.append(k_BMSH, v_BMSH, mask.offset)
        dropout = self.dropout if self.training else 0.0
        scores = Scores(
            mask,
            positions.score_factor * self.config.head_dim**-0.5,
            self.window,
            positions.slopes_N,
            self.sinks,
            dropout,
        )
        return self.o_proj(
            attend(self.kernel, q_BNSH, k_BMSH, v_BMSH, scores).transpose(1, 2).reshape(B, S, -1)
        )

    def _heads(self, x_BSX: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
        """[B, S, heads * H] -> [B, heads, S, H], normed over all heads together or over each."""
        B, S, _ = x_BSX.shape
        if norm is not None and self.config.qk_norm == "full":
            # OLMoE: one norm over all heads together, before they are split.
            return norm(x_BSX).view(B, S, -1, self.config.head_dim).transpose(1, 2)
        heads = x_BSX.view(B, S, -1, self.config.head_dim)
        return (heads if norm is None else norm(heads)).transpose(1, 2)
