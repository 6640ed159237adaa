"""Attention of the ranks that share a sequence: each computes a part of the heads."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pretrain.model.attention.kernels.base import AttentionKernel
from pretrain.model.attention.scores import Scores


def attend(
    kernel: AttentionKernel, q_BNSH: Tensor, k_BMUH: Tensor, v_BMUV: Tensor, scores: Scores
) -> Tensor:
    """A kernel's output [B, N, S, V] for queries of this rank's tokens, as for whole sequences.

    Args:
        scores: its mask is that of the whole sequences; slopes and sinks are those of all heads.
    """
    sequence = scores.mask.sequence
    if sequence is None:
        return kernel(q_BNSH, k_BMUH, v_BMUV, scores)
    # With fewer key heads than ranks, each is copied until every rank has one.
    if (copies := sequence.parts // k_BMUH.shape[1]) > 1:
        k_BMUH, v_BMUV = (x.repeat_interleave(copies, dim=1) for x in (k_BMUH, v_BMUV))
    q_BnUH, k_BmUH, v_BmUV = map(sequence.gather_tokens, (q_BNSH, k_BMUH, v_BMUV))
    slopes_N, sinks_N = scores.slopes_N, scores.sinks_N
    own_scores = replace(
        scores,
        slopes_N=None if slopes_N is None else sequence.own(slopes_N, dim=0),
        sinks_N=None if sinks_N is None else sequence.own(sinks_N, dim=0),
    )
    return sequence.gather_heads(kernel(q_BnUH, k_BmUH, v_BmUV, own_scores))
