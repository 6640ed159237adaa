"""Attention by its definition; tests compare the other kernels with it."""

from __future__ import annotations

import torch
from torch.nn import functional

from pretrain.model.attention.scores import Scores


def reference_attention(
    q_BNSH: torch.Tensor, k_BMUH: torch.Tensor, v_BMUV: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """In fp32 with every score in memory; [B, N, S, V] in the queries' dtype.

    U is the number of keys, V the width of a value.
    """
    groups = q_BNSH.shape[1] // k_BMUH.shape[1]
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k_BMUH, v_BMUV))
    num_queries = q_BNSH.shape[2]
    num_keys = k.shape[2]
    device = q_BNSH.device
    logits_BNSU = q_BNSH.float() @ k.transpose(-2, -1) * scores.scale
    if scores.slopes_N is not None:
        logits_BNSU = logits_BNSU - scores.slopes_N.float()[:, None, None] * scores.mask.distance(
            num_queries, num_keys, device
        )
    visible = scores.mask.dense(num_queries, num_keys, device, scores.window)
    logits_BNSU = logits_BNSU.masked_fill(~visible, float("-inf"))
    if scores.sinks_N is not None:
        sinks = scores.sinks_N.float()[None, :, None, None].expand(*logits_BNSU.shape[:3], 1)
        # The sink takes part in the softmax; its weight is cut off, so rows sum to less than 1.
        weights_BNSU = torch.cat((logits_BNSU, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights_BNSU = logits_BNSU.softmax(dim=-1)
    return (functional.dropout(weights_BNSU, scores.dropout) @ v).to(q_BNSH.dtype)
