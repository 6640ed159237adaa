"""Router losses and statistics, the same for every kind of MoE layer.

Fp32 whatever the model's precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pretrain.model.moe.base import RouterStatistics
from pretrain.model.moe.config import RoutedMoE
from pretrain.model.moe.router import Routing


@dataclass(frozen=True)
class RoutedBatch:
    """What a router loss may look at.

    Attributes:
        routing: the decision.
        counts_E: fp32 tokens that chose each expert.
        fractions_E: choices of each expert per token, over the micro batch or the global batch:
            they sum to top_k.
        sequences: B; tokens come sequence by sequence.
    """

    routing: Routing
    counts_E: torch.Tensor
    fractions_E: torch.Tensor
    sequences: int

    @property
    def num_experts(self) -> int:
        return self.routing.probs_TE.shape[1]

    @property
    def top_k(self) -> int:
        return self.routing.topk_ids_TK.shape[1]


def aux_loss(batch: RoutedBatch) -> torch.Tensor:
    """E / k * sum_e f_e p_e (Fedus et al. 2021, eq. 4, with f_e over all k choices as in Zoph et
    al. 2022): 1 under perfect balance.
    """
    return (
        batch.num_experts
        / batch.top_k
        * (batch.fractions_E * batch.routing.probs_TE.mean(dim=0)).sum()
    )


def z_loss(batch: RoutedBatch) -> torch.Tensor:
    """mean(logsumexp(logits)^2) (Zoph et al. 2022, eq. 5)."""
    return batch.routing.logits_TE.logsumexp(dim=-1).square().mean()


def sequence_loss(batch: RoutedBatch) -> torch.Tensor:
    """The mean over sequences of E / k * sum_e f_e p_e, counted in each sequence by itself
    (DeepSeek-V3, eq. 17 to 20): 1 when balanced.
    """
    ids_BX = batch.routing.topk_ids_TK.reshape(batch.sequences, -1)
    probs_BSE = batch.routing.probs_TE.unflatten(0, (batch.sequences, -1))
    counts_BE = torch.zeros_like(probs_BSE[:, 0]).scatter_add(
        1, ids_BX, torch.ones_like(ids_BX, dtype=probs_BSE.dtype)
    )
    fractions_BE = counts_BE / probs_BSE.shape[1]
    return (
        batch.num_experts / batch.top_k * (fractions_BE * probs_BSE.mean(dim=1)).sum(dim=-1).mean()
    )


def cv_loss(batch: RoutedBatch) -> torch.Tensor:
    """variance / mean^2 over the experts of their importance, the sum of their weights (Shazeer et
    al. 2017, eq. 6 and 7): 0 when balanced.
    """
    weights_TK, ids_TK = batch.routing.topk_weights_TK, batch.routing.topk_ids_TK
    importance_E = torch.zeros_like(batch.counts_E).scatter_add(
        0, ids_TK.reshape(-1), weights_TK.reshape(-1)
    )
    return importance_E.var(correction=0) / importance_E.mean().square().clamp_min(1e-20)


def entropy_loss(batch: RoutedBatch) -> torch.Tensor:
    """ln E minus the entropy of the mean probabilities (Shen et al. 2023, ModuleFormer, eq. 5): 0
    when all experts are used alike.
    """
    mean_E = batch.routing.probs_TE.mean(dim=0)
    return math.log(batch.num_experts) + torch.special.xlogy(mean_E, mean_E).sum()


# Each has its weight in the recipe, ``model.moe.<name>_weight``. The first two are always computed:
# curves of them are looked at.
LOSSES: dict[str, Callable[[RoutedBatch], torch.Tensor]] = {
    "aux_loss": aux_loss,
    "z_loss": z_loss,
    "sequence_loss": sequence_loss,
    "cv_loss": cv_loss,
    "entropy_loss": entropy_loss,
}
ALWAYS_COMPUTED = ("aux_loss", "z_loss")


def loss_weights(config: RoutedMoE) -> dict[str, float]:
    """The weight of each loss, in the order of ``LOSSES``."""
    return {name: float(getattr(config, f"{name}_weight")) for name in LOSSES}


def router_statistics(
    config: RoutedMoE,
    routing: Routing,
    counts_E: torch.Tensor,
    sequences: int,
    dropped: torch.Tensor,
    fractions_E: torch.Tensor | None = None,
) -> RouterStatistics:
    """Losses and statistics of one layer's routing of one micro batch; a loss without weight is 0.

    Args:
        counts_E: fp32 tokens that chose each expert, over all k choices.
        sequences: how many the tokens are from.
        dropped: fp32 [] share of choices dropped, for the record.
        fractions_E: choices per token of each expert counted elsewhere (over the global batch);
            from ``counts_E`` when left out.
    """
    if fractions_E is None:
        fractions_E = counts_E / routing.probs_TE.shape[0]
    batch = RoutedBatch(routing, counts_E, fractions_E, sequences)
    zero = counts_E.new_zeros(())
    losses = [
        LOSSES[name](batch) if weight or name in ALWAYS_COMPUTED else zero
        for name, weight in loss_weights(config).items()
    ]
    with torch.no_grad():
        entropy = -torch.special.xlogy(routing.probs_TE, routing.probs_TE).sum(dim=-1).mean()
    return RouterStatistics(torch.stack(losses), counts_E, entropy, dropped)
