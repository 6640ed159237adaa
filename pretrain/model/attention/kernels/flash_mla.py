"""Decoding of latent attention by the package flash_mla (FlashMLA, DeepSeek 2025), on Hopper.

Imported only if a recipe chooses it. It has no backward pass and knows one form only: a few queries
to cached latents of 576 elements, of which 512 are values. Everything else, such as training, is
computed by ``sdpa``.
"""

from __future__ import annotations

import torch
from flash_mla import flash_mla_with_kvcache, get_mla_metadata
from torch.nn import functional

from pretrain.model.attention.kernels.config import FlashMLA
from pretrain.model.attention.kernels.sdpa import sdpa_attention
from pretrain.model.attention.scores import Scores

# Tokens of a page of the cache: the only size that the package takes.
PAGE = FlashMLA.cache_multiple
KEY_SIZE, VALUE_SIZE = FlashMLA.latents


def flash_mla_attention(
    q_BNSH: torch.Tensor, k_BMUH: torch.Tensor, v_BMUV: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """An ``AttentionKernel``.

    In the absorbed form, whose keys and values are one tensor, the last elements of each output are
    those of the shared key: they are zero here, because callers cut them off.
    """
    if not takes(q_BNSH, k_BMUH, v_BMUV, scores):
        return sdpa_attention(q_BNSH, k_BMUH, v_BMUV, scores)
    batch_size, num_heads, num_queries, _ = q_BNSH.shape
    num_keys = k_BMUH.shape[2]
    pages, table_Bp = _paged(k_BMUH)
    lengths_B, metadata, splits = scores.mask.once(
        ("flash_mla", batch_size, num_heads, num_queries, num_keys),
        lambda: _schedule(batch_size, num_heads, num_queries, num_keys, q_BNSH.device),
    )
    y_BSNC, _ = flash_mla_with_kvcache(
        q_BNSH.transpose(1, 2).contiguous(),
        pages,
        table_Bp,
        lengths_B,
        VALUE_SIZE,
        metadata,
        splits,
        softmax_scale=scores.scale,
        # Aligned with the last key: cached keys come before the queries.
        causal=True,
    )
    return functional.pad(y_BSNC.transpose(1, 2), (0, KEY_SIZE - VALUE_SIZE))


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> bool:
    """Whether the package computes this; all else is computed by ``sdpa``."""
    return (
        k is v
        and tuple(k.shape[1::2]) == (1, KEY_SIZE)
        and q.dtype in (torch.bfloat16, torch.float16)
        and not (torch.is_grad_enabled() and q.requires_grad)
        and scores.mask.document_ids_BS is None
        and scores.window is None
        and scores.sinks_N is None
        and scores.slopes_N is None
        and scores.dropout == 0.0
    )


def _schedule(
    batch_size: int, num_heads: int, num_queries: int, num_keys: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lengths [B] int32, and how the package divides the work: one for all layers of a step."""
    lengths_B = torch.full((batch_size,), num_keys, dtype=torch.int32, device=device)
    metadata, splits = get_mla_metadata(lengths_B, num_queries * num_heads, 1)
    return lengths_B, metadata, splits


def _paged(k_B1UH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents as pages [P, PAGE, 1, H], and the pages of each sequence [B, p] int32.

    A cache whose sequences have room for whole pages is not copied: pages reach beyond the last
    token, into memory that the lengths exclude.
    """
    batch_size, _, num_keys, size = k_B1UH.shape
    room, rest = divmod(k_B1UH.stride(0), size)
    in_place = k_B1UH.stride(2) == size and rest == 0 and room % PAGE == 0 and room >= num_keys
    if in_place:
        pages = k_B1UH.as_strided(
            (batch_size * room // PAGE, PAGE, 1, size), (PAGE * size, size, size, 1)
        )
    else:
        missing = -num_keys % PAGE
        pages = functional.pad(k_B1UH, (0, 0, 0, missing)).reshape(-1, PAGE, 1, size)
    table_Bp = torch.arange(len(pages), dtype=torch.int32, device=k_B1UH.device)
    return pages, table_Bp.view(batch_size, -1)
