"""Attention by torch's fused scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch.nn import functional

from pretrain.model.attention.kernels.sink_key import widened, with_sinks
from pretrain.model.attention.scores import Scores


def sdpa_attention(
    q_BNSH: torch.Tensor, k_BMUH: torch.Tensor, v_BMUV: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """Exact attention; no mask is in memory without a window, documents or ALiBi.

    Otherwise there is one mask [S, U] for all layers; with ALiBi, one per head.
    """
    num_queries = q_BNSH.shape[2]
    num_keys = k_BMUH.shape[2]
    value_size = v_BMUV.shape[3]
    num_heads = q_BNSH.shape[1]
    num_key_heads = k_BMUH.shape[1]
    mask = None
    if scores.slopes_N is not None or not scores.mask.is_trivial(num_queries, scores.window):
        key = "sdpa", num_queries, num_keys, scores.window
        mask = scores.mask.once(key, lambda: _mask(scores, num_queries, num_keys, q_BNSH))
    # A single query sees all keys; is_causal would align it with the first one.
    causal = mask is None and num_queries > 1
    if scores.sinks_N is not None:
        # sdpa multiplies all scores by the scale, the sinks included: they are divided by it first.
        q_BNSH, k_BMUH, v_BMUV = with_sinks(
            q_BNSH, k_BMUH, v_BMUV, sinks_N=scores.sinks_N / scores.scale
        )
        if causal:
            # The sink is key 0, so is_causal would hide each query's own key: one more query in
            # front, which sees the sink alone, shifts them back.
            q_BNSH = functional.pad(q_BNSH, (0, 0, 1, 0))
    # Fused kernels want values as wide as keys.
    width = max(q_BNSH.shape[3], value_size)
    q_BNSH, k_BMUH, v_BMUV = (widened(x, width) for x in (q_BNSH, k_BMUH, v_BMUV))
    if num_queries == 1 and scores.slopes_N is None:
        # The heads that share a key head become queries of it, so that no key is repeated.
        q_BNSH = q_BNSH.reshape(-1, num_key_heads, num_heads // num_key_heads, width)
    grouped = q_BNSH.shape[1] != num_key_heads
    y_BNSV = functional.scaled_dot_product_attention(
        q_BNSH,
        k_BMUH,
        v_BMUV,
        attn_mask=mask,
        dropout_p=scores.dropout,
        is_causal=causal,
        scale=scores.scale,
        enable_gqa=grouped,
    )
    y_BNSV = (
        # Undo the reshape, or drop the extra query of the sinks.
        y_BNSV.reshape(-1, num_heads, 1, width) if num_queries == 1 else y_BNSV[:, :, -num_queries:]
    )
    return y_BNSV[..., :value_size]


def _mask(scores: Scores, num_queries: int, num_keys: int, q_BNSH: torch.Tensor) -> torch.Tensor:
    """Whether a query sees a key, or with ALiBi a bias in the queries' dtype.

    [B or 1, N or 1, S, U]; with sinks [..., 1 + U].
    """
    mask = scores.mask.dense(num_queries, num_keys, q_BNSH.device, scores.window)
    if scores.slopes_N is not None:
        distance = scores.mask.distance(num_queries, num_keys, q_BNSH.device)
        penalty_NSU = -scores.slopes_N.float()[:, None, None] * distance
        mask = penalty_NSU.to(q_BNSH.dtype)[None].masked_fill(~mask, float("-inf"))
    if scores.sinks_N is not None:
        # The sink's column: visible (True), or a bias of 0.
        mask = functional.pad(mask, (1, 0), value=float(mask.dtype == torch.bool))
    return mask
