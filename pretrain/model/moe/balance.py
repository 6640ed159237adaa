"""Router losses and statistics, the same for every kind of MoE layer; fp32 whatever the model's precision."""

from __future__ import annotations

import torch

from pretrain.model.moe.interface import RouterStatistics


def router_statistics(
    logits_TE: torch.Tensor, counts_E: torch.Tensor, top_k: int, dropped: torch.Tensor, fractions_E: torch.Tensor | None = None
) -> RouterStatistics:
    """Losses and statistics of one layer's routing of one micro batch.

    The load-balance loss is E / k * sum_e f_e p_e (Fedus et al. 2021, eq. 4, with f_e over all k choices as in Zoph et al. 2022): f_e is
    the number of choices of expert e per token, so that sum_e f_e = k; p_e is the mean probability of e. It is 1 under perfect balance.
    The z-loss is mean(logsumexp(logits)^2) (Zoph et al. 2022, eq. 5).

    Args:
        logits_TE: fp32 router logits.
        counts_E: fp32 tokens that chose each expert, over all k choices.
        dropped: fp32 [] share of choices dropped, for the record.
        fractions_E: f_e counted elsewhere (over the global batch); from ``counts_E`` when left out.
    """
    num_tokens, num_experts = logits_TE.shape
    log_z_T = logits_TE.logsumexp(dim=-1)
    log_probs_TE = logits_TE - log_z_T[:, None]
    probs_TE = log_probs_TE.exp()
    if fractions_E is None:
        fractions_E = counts_E / num_tokens
    aux_loss = num_experts / top_k * (fractions_E * probs_TE.mean(dim=0)).sum()
    with torch.no_grad():
        entropy = -(probs_TE * log_probs_TE).sum(dim=-1).mean()
    return RouterStatistics(aux_loss, log_z_T.square().mean(), counts_E, entropy, dropped)
