"""Grouped-query attention and its key/value cache."""

from __future__ import annotations

import torch
from torch import nn

from pretrain.config.schema import ModelConfig
from pretrain.model.attention.kernels import KERNELS
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.norm import RMSNorm
from pretrain.model.positions.rope import apply_rope


class LayerCache:
    """Keys and values of one layer for the tokens seen so far: two [B, M, max_tokens, H] tensors, filled from the left."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device | str, dtype: torch.dtype) -> None:
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def append(self, k_BMSH: torch.Tensor, v_BMSH: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new keys and values behind ``offset`` tokens and returns all of them, [B, M, offset + S, H]."""
        end = offset + k_BMSH.shape[2]
        self.keys[:, :, offset:end] = k_BMSH
        self.values[:, :, offset:end] = v_BMSH
        return self.keys[:, :, :end], self.values[:, :, :end]


class GroupedQueryAttention(nn.Module):
    """N query heads share M key/value heads (Ainslie et al. 2023); optional RMSNorm on each query and key head before RoPE."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        attention, hidden_size = config.attention, config.hidden_size
        self.head_dim = attention.head_dim
        self.q_proj = nn.Linear(hidden_size, attention.num_attention_heads * attention.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, attention.num_key_value_heads * attention.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, attention.num_key_value_heads * attention.head_dim, bias=False)
        self.o_proj = nn.Linear(attention.num_attention_heads * attention.head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(attention.head_dim, config.rms_norm_eps) if attention.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(attention.head_dim, config.rms_norm_eps) if attention.qk_norm else nn.Identity()
        self.kernel = KERNELS[attention.kernel]

    def forward(
        self, x_BSD: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], mask: AttentionMask, cache: LayerCache | None = None
    ) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]. ``rope`` holds the tables of these S positions."""
        B, S, _ = x_BSD.shape
        q_BNSH = self.q_norm(self.q_proj(x_BSD).view(B, S, -1, self.head_dim)).transpose(1, 2)
        k_BMSH = self.k_norm(self.k_proj(x_BSD).view(B, S, -1, self.head_dim)).transpose(1, 2)
        v_BMSH = self.v_proj(x_BSD).view(B, S, -1, self.head_dim).transpose(1, 2)
        q_BNSH, k_BMSH = apply_rope(q_BNSH, rope), apply_rope(k_BMSH, rope)
        if cache is not None:
            k_BMSH, v_BMSH = cache.append(k_BMSH, v_BMSH, mask.offset)
        return self.o_proj(self.kernel(q_BNSH, k_BMSH, v_BMSH, mask).transpose(1, 2).reshape(B, S, -1))
