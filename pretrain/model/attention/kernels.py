"""Ways to compute softmax(q k^T / sqrt(H)) v: the plain one that tests trust, and torch's fused one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from pretrain.model.attention.scores import Scores

AttentionKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scores], torch.Tensor]


def reference_attention(q_BNSH: torch.Tensor, k_BMUH: torch.Tensor, v_BMUH: torch.Tensor, scores: Scores) -> torch.Tensor:
    """The definition, in fp32 with every score in memory. U is the number of keys. Returns [B, N, S, H] in the queries' dtype."""
    groups = q_BNSH.shape[1] // k_BMUH.shape[1]
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k_BMUH, v_BMUH))
    num_queries, num_keys = q_BNSH.shape[2], k.shape[2]
    logits_BNSU = q_BNSH.float() @ k.transpose(-2, -1) * scores.scale
    if scores.slopes_N is not None:
        queries = torch.arange(num_queries, device=k.device)[:, None] + scores.mask.offset
        distance_SU = queries - torch.arange(num_keys, device=k.device)[None, :]
        logits_BNSU = logits_BNSU - scores.slopes_N.float()[:, None, None] * distance_SU
    visible = scores.mask.dense(num_queries, num_keys, q_BNSH.device, scores.window)
    logits_BNSU = logits_BNSU.masked_fill(~visible, float("-inf"))
    if scores.sinks_N is not None:
        sinks = scores.sinks_N.float()[None, :, None, None].expand(*logits_BNSU.shape[:3], 1)
        weights_BNSU = torch.cat((logits_BNSU, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights_BNSU = logits_BNSU.softmax(dim=-1)
    return (functional.dropout(weights_BNSU, scores.dropout) @ v).to(q_BNSH.dtype)


def sdpa_attention(q_BNSH: torch.Tensor, k_BMUH: torch.Tensor, v_BMUH: torch.Tensor, scores: Scores) -> torch.Tensor:
    """torch's scaled_dot_product_attention; same shapes and meaning as :func:`reference_attention`."""
    grouped = q_BNSH.shape[1] != k_BMUH.shape[1]
    num_queries, num_keys = q_BNSH.shape[2], k_BMUH.shape[2]
    if scores.mask.is_plain_causal(num_queries, scores.window):
        return functional.scaled_dot_product_attention(q_BNSH, k_BMUH, v_BMUH, is_causal=True, enable_gqa=grouped, scale=scores.scale)
    visible = scores.mask.dense(num_queries, num_keys, q_BNSH.device, scores.window)
    return functional.scaled_dot_product_attention(q_BNSH, k_BMUH, v_BMUH, attn_mask=visible, enable_gqa=grouped, scale=scores.scale)


KERNELS: dict[str, AttentionKernel] = {"reference": reference_attention, "sdpa": sdpa_attention}
