"""Attention by the package flash_attn (Dao 2023, FlashAttention-2).

Imported only where a recipe chooses it.
"""

from __future__ import annotations

import torch
from flash_attn import flash_attn_func

from pretrain.core.errors import ConfigError
from pretrain.model.attention.scores import Scores


def flash_attention(
    q_BNSH: torch.Tensor, k_BMUH: torch.Tensor, v_BMUH: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """What its section says.

    The causal mask ends at the last key: cached keys come before the queries.

    Raises:
        ConfigError: on another device, or in another dtype.
    """
    half = q_BNSH.dtype in (torch.float16, torch.bfloat16)
    if q_BNSH.device.type != "cuda" or not half:
        raise ConfigError(
            f"model.attention.kernel=flash takes fp16 or bf16 on CUDA, not {q_BNSH.dtype} on "
            f"{q_BNSH.device.type}: use --set model.attention.kernel=sdpa"
        )
    heads_last = (x.transpose(1, 2) for x in (q_BNSH, k_BMUH, v_BMUH))
    y_BSNH = flash_attn_func(
        *heads_last,
        dropout_p=scores.dropout,
        softmax_scale=scores.scale,
        causal=True,
        window_size=(-1, -1) if scores.window is None else (scores.window - 1, 0),
        alibi_slopes=scores.slopes_N,
    )
    y_BNSH: torch.Tensor = y_BSNH.transpose(1, 2)
    return y_BNSH
