"""Ways to compute softmax(q k^T / sqrt(H)) v: the plain one that tests trust, and torch's fused one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from pretrain.model.attention.mask import AttentionMask

AttentionKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionMask], torch.Tensor]


def reference_attention(q_BNSH: torch.Tensor, k_BMUH: torch.Tensor, v_BMUH: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
    """The definition, in fp32 with every score in memory. U is the number of keys. Returns [B, N, S, H] in the queries' dtype."""
    groups = q_BNSH.shape[1] // k_BMUH.shape[1]
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k_BMUH, v_BMUH))
    scores = q_BNSH.float() @ k.transpose(-2, -1) * q_BNSH.shape[-1] ** -0.5
    visible = mask.dense(q_BNSH.shape[2], k.shape[2], q_BNSH.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return (weights @ v).to(q_BNSH.dtype)


def sdpa_attention(q_BNSH: torch.Tensor, k_BMUH: torch.Tensor, v_BMUH: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
    """torch's scaled_dot_product_attention; same shapes and meaning as :func:`reference_attention`."""
    grouped = q_BNSH.shape[1] != k_BMUH.shape[1]
    if mask.is_plain_causal:
        return functional.scaled_dot_product_attention(q_BNSH, k_BMUH, v_BMUH, is_causal=True, enable_gqa=grouped)
    one_query_sees_all = q_BNSH.shape[2] == 1 and mask.document_ids_BS is None
    visible = None if one_query_sees_all else mask.dense(q_BNSH.shape[2], k_BMUH.shape[2], q_BNSH.device)
    return functional.scaled_dot_product_attention(q_BNSH, k_BMUH, v_BMUH, attn_mask=visible, enable_gqa=grouped)


KERNELS: dict[str, AttentionKernel] = {"reference": reference_attention, "sdpa": sdpa_attention}
