"""Multi-head latent attention and its cache.

DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv 2412.19437, section 2.1.1.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from pretrain.model.attention import split_heads
from pretrain.model.attention.config import MultiHeadLatentAttentionConfig
from pretrain.model.attention.kernels.base import attention_kernel
from pretrain.model.attention.kernels.config import kernel_section
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.attention.scores import Scores
from pretrain.model.config import ModelConfig
from pretrain.model.norm import LayerNorm, RMSNorm
from pretrain.model.positions.interface import PositionTerms
from pretrain.model.positions.rope import apply_rope


class LatentCache:
    """Latents and rotated keys of one layer, concatenated: [B, 1, max_tokens, C + R].

    Filled from the left.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.latents = torch.zeros(shape, device=device, dtype=dtype)

    def append(self, latents_B1SX: torch.Tensor, offset: int) -> torch.Tensor:
        """Store new ones after ``offset`` tokens and return all, [B, 1, offset + S, C + R]."""
        end = offset + latents_B1SX.shape[2]
        self.latents[:, :, offset:end] = latents_B1SX
        return self.latents[:, :, :end]


class MultiHeadLatentAttention(nn.Module):
    """Keys and values of N heads are computed from one latent of C elements per token.

    R more elements of a key are rotated and shared by all heads. A head of a query or a key has H =
    qk_nope_head_dim elements of its own and these R; a value has V = v_head_dim. Scores are divided
    by sqrt(H + R) in either form. With a cache there are two forms with the same result:

    - plain, as in training: keys and values of all cached tokens are computed from their latents;
    - absorbed: (W_UK c) q = c (W_UK^T q), so a query is mapped into the space of the latents,
      attends to them as one key/value head of C + R elements, and its output is mapped back by
      W_UV. Nothing with the size of all heads is computed per cached token.

    W_UK and W_UV are read from ``kv_b_proj`` at each call: a stored product would become stale
    after a training step.
    """

    def __init__(self, model: ModelConfig, layer: int) -> None:
        super().__init__()
        config = cast(MultiHeadLatentAttentionConfig, model.attention)
        self.config = config
        self.window = config.window(layer)
        self.dropout = model.dropout.attention
        latent_norm = RMSNorm if config.latent_norm == "rms_norm" else LayerNorm
        hidden = model.hidden_size
        biased = config.bias == "all"
        self.num_heads = config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, config.score_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=biased)
            self.q_a_norm = latent_norm(config.q_lora_rank, model.norm.eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, config.score_dim, bias=False)
        self.kv_a_proj = nn.Linear(
            hidden, config.kv_lora_rank + config.qk_rope_head_dim, bias=biased
        )
        self.kv_a_norm = latent_norm(config.kv_lora_rank, model.norm.eps)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank,
            self.num_heads * (config.qk_nope_head_dim + config.v_head_dim),
            bias=False,
        )
        self.o_proj = nn.Linear(config.value_dim, hidden, bias=biased)
        self.sinks = nn.Parameter(torch.zeros(self.num_heads)) if config.sinks else None
        self.scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
        self.kernel = attention_kernel(config.kernel, self.o_proj.weight.device)

    def new_cache(
        self, batch_size: int, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> LatentCache:
        """An empty cache of this layer."""
        multiple = kernel_section(self.config.kernel).cache_multiple
        max_tokens = -(-max_tokens // multiple) * multiple
        return LatentCache((batch_size, 1, max_tokens, self.config.cached_per_token), device, dtype)

    def forward(
        self,
        x_BSD: torch.Tensor,
        positions: PositionTerms,
        mask: AttentionMask,
        cache: LatentCache | None = None,
    ) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]; ``positions`` are the terms of these S tokens."""
        B, S, _ = x_BSD.shape
        q_BNSX = self._queries(x_BSD, positions)
        latents_B1UX = self._latents(x_BSD, positions)
        # In training there is no cache, and keys of full width are cheaper than latents.
        attend = self._plain
        if cache is not None:
            latents_B1UX = cache.append(latents_B1UX, mask.offset)
            attend = (
                self._absorbed
                if self._absorbing_is_cheaper(S, latents_B1UX.shape[2])
                else self._plain
            )
        dropout = self.dropout if self.training else 0.0
        scores = Scores(
            mask,
            positions.score_factor * self.scale,
            self.window,
            positions.slopes_N,
            self.sinks,
            dropout,
        )
        return self.o_proj(attend(q_BNSX, latents_B1UX, scores).transpose(1, 2).reshape(B, S, -1))

    def _queries(self, x_BSD: torch.Tensor, positions: PositionTerms) -> torch.Tensor:
        """[B, S, D] -> [B, N, S, H + R], the last R elements of each head rotated."""
        q_BSX = (
            self.q_proj(x_BSD)
            if self.config.q_lora_rank is None
            else self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BSD)))
        )
        return self._rotated(q_BSX.unflatten(2, (self.num_heads, -1)).transpose(1, 2), positions)

    def _latents(self, x_BSD: torch.Tensor, positions: PositionTerms) -> torch.Tensor:
        """[B, S, D] -> [B, 1, S, C + R]: normed latents and the rotated shared key, as cached."""
        latents_BSC, shared_keys_BSR = self.kv_a_proj(x_BSD).split(
            (self.config.kv_lora_rank, self.config.qk_rope_head_dim), dim=-1
        )
        # The shared key is not normed.
        return self._rotated(
            torch.cat((self.kv_a_norm(latents_BSC), shared_keys_BSR), dim=-1)[:, None], positions
        )

    def _rotated(self, x: torch.Tensor, positions: PositionTerms) -> torch.Tensor:
        """``x`` with its last R elements rotated, if the kind of position rotates any."""
        return x if positions.rope is None else apply_rope(x, positions.rope)

    def _plain(
        self, q_BNSX: torch.Tensor, latents_B1UX: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """Queries and latents -> [B, N, S, V]."""
        latents_BUC = latents_B1UX[:, 0, :, : self.config.kv_lora_rank]
        shared_keys_B1UR = latents_B1UX[..., self.config.kv_lora_rank :]
        keys_values_BNUX = (
            self.kv_b_proj(latents_BUC).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        )
        k_BNUH, v_BNUV = keys_values_BNUX.split(
            (self.config.qk_nope_head_dim, self.config.v_head_dim), dim=-1
        )
        k_BNUX = torch.cat((k_BNUH, shared_keys_B1UR.expand(-1, self.num_heads, -1, -1)), dim=-1)
        return split_heads.attend(self.kernel, q_BNSX, k_BNUX, v_BNUV, scores)

    def _absorbed(
        self, q_BNSX: torch.Tensor, latents_B1UX: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """The same without keys and values, [B, N, S, V].

        The latents with their shared key serve as both; the shared key's part of the result is cut
        off.
        """
        # Rows of kv_b_proj are W_UK and W_UV of each head, one after the other.
        up_NXC = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        up_keys_NHC, up_values_NVC = up_NXC.split(
            (self.config.qk_nope_head_dim, self.config.v_head_dim), dim=1
        )
        q_BNSH, rotated_BNSR = q_BNSX.split(
            (self.config.qk_nope_head_dim, self.config.qk_rope_head_dim), dim=-1
        )
        q_BNSX = torch.cat((q_BNSH @ up_keys_NHC, rotated_BNSR), dim=-1)
        y_BNSC = self.kernel(q_BNSX, latents_B1UX, latents_B1UX, scores)[
            ..., : self.config.kv_lora_rank
        ]
        return y_BNSC @ up_values_NVC.transpose(1, 2)

    def _absorbing_is_cheaper(self, S: int, U: int) -> bool:
        """Whether S queries of U tokens multiply less in the absorbed form; counts are per head.

        W_UK and W_UV are multiplied with S queries instead of U latents, but scores and values are
        of wider vectors. So steps of one or a few tokens are absorbed, and long prompts are not.
        """
        config = self.config
        up = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
        plain = U * up + S * U * (
            config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        )
        return config.decode == "absorbed" and S * up + S * U * 2 * config.cached_per_token < plain
