"""Attention by the package flash_attn (Dao 2023, FlashAttention-2).

Imported only if a recipe chooses it.
"""

from __future__ import annotations

import torch
from flash_attn import flash_attn_func

from pretrain.core.errors import ConfigError
from pretrain.model.attention.kernels.sink_key import widened, with_sinks
from pretrain.model.attention.scores import Scores


def flash_attention(
    q_BNSH: torch.Tensor, k_BMUH: torch.Tensor, v_BMUH: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """An ``AttentionKernel`` without document masks, and with sinks only if every key is seen.

    flash_attn aligns the causal mask with the last key: cached keys come before the queries, and so
    does the key of the sinks. A window would leave it out, and ALiBi would penalise it.

    Raises:
        ConfigError: on another device than CUDA, or in another dtype than fp16 or bf16.
    """
    _check_place(q_BNSH)
    size = v_BMUH.shape[3]
    if scores.sinks_N is not None:
        # The scale is of all scores, the sinks included: they are divided by it first.
        q_BNSH, k_BMUH, v_BMUH = with_sinks(
            q_BNSH, k_BMUH, v_BMUH, sinks_N=scores.sinks_N / scores.scale
        )
        v_BMUH = widened(v_BMUH, k_BMUH.shape[3])
    # flash_attn wants [B, S, N, H].
    heads_last = (x.transpose(1, 2) for x in (q_BNSH, k_BMUH, v_BMUH))
    y_BSNH = flash_attn_func(
        *heads_last,
        dropout_p=scores.dropout,
        softmax_scale=scores.scale,
        causal=True,
        # Tokens before the query, without itself.
        window_size=(-1, -1) if scores.window is None else (scores.window - 1, 0),
        alibi_slopes=scores.slopes_N,
    )
    y_BNSH: torch.Tensor = y_BSNH[..., :size].transpose(1, 2)
    return y_BNSH


def _check_place(q_BNSH: torch.Tensor) -> None:
    half = q_BNSH.dtype in (torch.float16, torch.bfloat16)
    if q_BNSH.device.type != "cuda" or not half:
        raise ConfigError(
            f"model.attention.kernel=flash takes fp16 or bf16 on CUDA, not {q_BNSH.dtype} on "
            f"{q_BNSH.device.type}: use --set model.attention.kernel=sdpa"
        )
