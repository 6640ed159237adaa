"""Attention by the package flash_attn (Dao 2023, FlashAttention-2).

Imported only if a recipe chooses it.
"""

from __future__ import annotations

import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func

from pretrain.model.attention.kernels.packed import check_place, rows_of, window_before
from pretrain.model.attention.kernels.sink_key import widened, with_sinks
from pretrain.model.attention.scores import Scores


def flash_attention(
    q_BNSH: torch.Tensor, k_BMUH: torch.Tensor, v_BMUH: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """An ``AttentionKernel``, with sinks only if every key is seen.

    flash_attn aligns the causal mask with the last key: cached keys come before the queries, and so
    does the key of the sinks. A window would leave it out, and ALiBi would penalise it.

    Raises:
        ConfigError: on another device than CUDA, or in another dtype than fp16 or bf16.
    """
    check_place("flash", q_BNSH)
    size = v_BMUH.shape[3]
    num_queries, num_keys = q_BNSH.shape[2], k_BMUH.shape[2]
    options = {
        "dropout_p": scores.dropout,
        "softmax_scale": scores.scale,
        "causal": True,
        "window_size": window_before(scores),
        "alibi_slopes": scores.slopes_N,
    }
    if scores.mask.document_ids_BS is not None:
        assert scores.sinks_N is None, "the section refuses sinks with documents"
        packed = scores.mask.packed(num_queries)
        y_TNH = flash_attn_varlen_func(
            *(rows_of(x) for x in (q_BNSH, k_BMUH, v_BMUH)),
            cu_seqlens_q=packed.queries_C,
            cu_seqlens_k=packed.keys_C,
            max_seqlen_q=num_queries,
            max_seqlen_k=num_keys,
            **options,
        )
        return y_TNH.unflatten(0, (-1, num_queries)).transpose(1, 2)
    if scores.sinks_N is not None:
        # The scale is of all scores, the sinks included: they are divided by it first.
        q_BNSH, k_BMUH, v_BMUH = with_sinks(
            q_BNSH, k_BMUH, v_BMUH, sinks_N=scores.sinks_N / scores.scale
        )
        v_BMUH = widened(v_BMUH, k_BMUH.shape[3])
    # flash_attn wants [B, S, N, H].
    y_BSNH = flash_attn_func(*(x.transpose(1, 2) for x in (q_BNSH, k_BMUH, v_BMUH)), **options)
    y_BNSH: torch.Tensor = y_BSNH[..., :size].transpose(1, 2)
    return y_BNSH
