"""Attention inside packed documents by torch's varlen_attn (FlashAttention, Dao 2023).

Imported only if a recipe or ``auto`` chooses it.
"""

from __future__ import annotations

import torch
from torch.nn.attention.varlen import varlen_attn

from pretrain.model.attention.kernels.packed import check_place, rows_of, window_before
from pretrain.model.attention.kernels.sdpa import sdpa_attention
from pretrain.model.attention.kernels.sink_key import widened
from pretrain.model.attention.scores import Scores

# Elements that the size of a head is rounded up to: torch's function does not pad.
HEAD_MULTIPLE = 8


def varlen_attention(
    q_BNSH: torch.Tensor, k_BMUH: torch.Tensor, v_BMUV: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """An ``AttentionKernel``; what it does not take is computed by ``sdpa``.

    Raises:
        ConfigError: for documents on another device than CUDA, or in another dtype than fp16 or
            bf16.
    """
    if not takes(scores):
        return sdpa_attention(q_BNSH, k_BMUH, v_BMUV, scores)
    check_place("varlen", q_BNSH)
    num_queries, size = q_BNSH.shape[2], v_BMUV.shape[3]
    width = -(-max(q_BNSH.shape[3], size) // HEAD_MULTIPLE) * HEAD_MULTIPLE
    packed = scores.mask.packed(num_queries)
    q_TNH, k_TMH, v_TMH = (rows_of(widened(x, width)) for x in (q_BNSH, k_BMUH, v_BMUV))
    y_TNH = varlen_attn(
        q_TNH,
        k_TMH,
        v_TMH,
        packed.queries_C,
        packed.keys_C,
        num_queries,
        num_queries,
        scale=scores.scale,
        window_size=window_before(scores),
        enable_gqa=q_BNSH.shape[1] != k_BMUH.shape[1],
    )
    assert isinstance(y_TNH, torch.Tensor)
    return y_TNH.unflatten(0, (-1, num_queries)).transpose(1, 2)[..., :size]


def takes(scores: Scores) -> bool:
    """Whether torch's function computes this."""
    return (
        scores.mask.document_ids_BS is not None
        and scores.mask.offset == 0
        and scores.slopes_N is None
        and scores.sinks_N is None
        and scores.dropout == 0.0
    )
