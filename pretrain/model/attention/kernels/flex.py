"""Attention by torch's flex_attention (Dong et al. 2024), which skips fully masked blocks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.attention import flex_attention as torch_flex

from pretrain.core.errors import ConfigError
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.attention.scores import Scores


def flex_attention(
    q_BNSH: torch.Tensor, k_BMUH: torch.Tensor, v_BMUV: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """A fused kernel on CUDA; on a CPU all scores are in memory, and there is no backward pass.

    Sinks follow from the logsumexp: a row whose sum of exponentials is Z shrinks by Z / (Z +
    e^sink) = sigmoid(log Z - sink).

    Raises:
        ConfigError: if torch has no such kernel for the device.
    """
    device, (num_queries, num_keys) = q_BNSH.device, (q_BNSH.shape[2], k_BMUH.shape[2])
    mask = scores.mask
    window = scores.window
    key = "flex", num_queries, num_keys, window
    penalty = _penalty(scores, device)
    # Built once per forward pass: all layers with this window share it.
    block_mask = mask.once(key, lambda: _block_mask(mask, num_queries, num_keys, window, device))
    attend: Any = _compiled() if device.type == "cuda" else torch_flex.flex_attention
    try:
        y_BNSV, rows = attend(
            q_BNSH,
            k_BMUH,
            v_BMUV,
            score_mod=penalty,
            block_mask=block_mask,
            scale=scores.scale,
            enable_gqa=q_BNSH.shape[1] != k_BMUH.shape[1],
            return_aux=torch_flex.AuxRequest(lse=True),
        )
    except NotImplementedError as error:
        raise ConfigError(
            f"model.attention.kernel=flex cannot run here ({error}): use --set "
            "model.attention.kernel=sdpa"
        ) from None
    # The normalised output without the sink is scaled down afterwards: flex has no term for it.
    if scores.sinks_N is not None:
        y_BNSV = y_BNSV * torch.sigmoid(rows.lse - scores.sinks_N.float()[:, None])[..., None]
    return y_BNSV.to(q_BNSH.dtype)


@cache
def _compiled() -> Any:
    return torch.compile(torch_flex.flex_attention)


def _offset(mask: AttentionMask, device: torch.device) -> torch.Tensor:
    # A tensor, as in torch's own decoding examples: an int would be compiled in, and every
    # generated token would compile again.
    return mask.once("flex offset", lambda: torch.tensor(mask.offset, device=device))


def _penalty(scores: Scores, device: torch.device) -> Any:
    """ALiBi's term as a ``score_mod``, or None."""
    slopes_N = scores.slopes_N
    offset = _offset(scores.mask, device)
    if slopes_N is None:
        return None

    def penalised(
        score: torch.Tensor,
        b: torch.Tensor,
        n: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
    ) -> torch.Tensor:
        return score - slopes_N[n] * (query + offset - key)

    return penalised


def _block_mask(
    mask: AttentionMask, num_queries: int, num_keys: int, window: int | None, device: torch.device
) -> torch_flex.BlockMask:
    """The blocks of queries and keys that are not fully masked."""
    offset = _offset(mask, device)
    ids_BS = mask.document_ids_BS

    def visible(
        b: torch.Tensor, n: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        distance = query + offset - key
        seen = distance >= 0
        if window is not None:
            seen = seen & (distance < window)
        if ids_BS is not None:
            seen = seen & (ids_BS[b, query + offset] == ids_BS[b, key])
        return seen

    batch_size = None if ids_BS is None else ids_BS.shape[0]
    return torch_flex.create_block_mask(
        visible, batch_size, None, num_queries, num_keys, device=device
    )
