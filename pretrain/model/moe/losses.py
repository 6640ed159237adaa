"""Router losses and statistics, the same for every kind of MoE layer.

Always in fp32: the differences that balance experts are lost in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pretrain.model.moe.base import RouterStatistics
from pretrain.model.moe.config import RoutedMoE
from pretrain.model.moe.router import Routing
from pretrain.model.token_parallel import TokenParts


@dataclass(frozen=True)
class RoutedBatch:
    """The routing of one micro batch, as router losses see it.

    Attributes:
        routing: the decision.
        counts_E: fp32 tokens that chose each expert.
        fractions_E: choices of each expert per token, over the micro batch or the global batch;
            they sum to top_k.
        mean_probs_E: the mean of the tokens' distributions over the micro batch.
        sequences: B; tokens are ordered sequence by sequence.
        mean_of_parts: the mean over the ranks that share the sequences, of which ``routing`` and
            ``counts_E`` have this rank's tokens only.
    """

    routing: Routing
    counts_E: torch.Tensor
    fractions_E: torch.Tensor
    mean_probs_E: torch.Tensor
    sequences: int
    mean_of_parts: Callable[[torch.Tensor], torch.Tensor]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.routing.probs_TE.shape[1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.routing.topk_ids_TK.shape[1]


def aux_loss(batch: RoutedBatch) -> torch.Tensor:
    """E / k * sum_e f_e p_e: 1 under perfect balance.

    Fedus et al. 2021, eq. 4, with f_e over all k choices as in Zoph et al. 2022. f is counted and
    has no gradient; it flows through the mean probabilities p alone.
    """
    return batch.num_experts / batch.top_k * (batch.fractions_E * batch.mean_probs_E).sum()


def z_loss(batch: RoutedBatch) -> torch.Tensor:
    """mean(logsumexp(logits)^2) (Zoph et al. 2022, eq. 5)."""
    logsumexp_T = batch.routing.logsumexp_T
    if logsumexp_T is None:
        logsumexp_T = batch.routing.logits_TE.logsumexp(dim=-1)
    return logsumexp_T.square().mean()


def sequence_loss(batch: RoutedBatch) -> torch.Tensor:
    """The mean over sequences of the aux loss counted in each sequence alone: 1 when balanced.

    DeepSeek-V3, eq. 17 to 20.
    """
    ids_BX = batch.routing.topk_ids_TK.reshape(batch.sequences, -1)
    probs_BSE = batch.routing.probs_TE.unflatten(0, (batch.sequences, -1))
    # Integer ids give counts without a gradient, as f in aux_loss.
    counts_BE = torch.zeros_like(probs_BSE[:, 0]).scatter_add(
        1, ids_BX, torch.ones_like(ids_BX, dtype=probs_BSE.dtype)
    )
    means_2BE = torch.stack((counts_BE / probs_BSE.shape[1], probs_BSE.mean(dim=1)))
    fractions_BE, mean_probs_BE = batch.mean_of_parts(means_2BE)
    return batch.num_experts / batch.top_k * (fractions_BE * mean_probs_BE).sum(dim=-1).mean()


def cv_loss(batch: RoutedBatch) -> torch.Tensor:
    """variance / mean^2 of the experts' importance, the sum of their weights: 0 when balanced.

    Shazeer et al. 2017, eq. 6 and 7.
    """
    weights_TK = batch.routing.topk_weights_TK
    ids_TK = batch.routing.topk_ids_TK
    importance_E = torch.zeros_like(batch.counts_E).scatter_add(
        0, ids_TK.reshape(-1), weights_TK.reshape(-1)
    )
    # Of all ranks it is a multiple of the mean, which gives the same loss.
    importance_E = batch.mean_of_parts(importance_E)
    # Population variance; the bound keeps an all-zero importance from dividing by zero.
    return importance_E.var(correction=0) / importance_E.mean().square().clamp_min(1e-20)


def entropy_loss(batch: RoutedBatch) -> torch.Tensor:
    """ln E minus the entropy of the mean probabilities: 0 when all experts are used equally.

    Shen et al. 2023, ModuleFormer, eq. 5.
    """
    mean_E = batch.mean_probs_E
    # xlogy is 0 at 0, where p * log(p) would be NaN.
    return math.log(batch.num_experts) + torch.special.xlogy(mean_E, mean_E).sum()


# By the name of their weight in the recipe, ``model.moe.<name>_weight``; the order is that of
# RouterStatistics.losses_J. The first two are always computed, because their curves are logged.
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
    token_parts: TokenParts | None = None,
) -> RouterStatistics:
    """Losses and statistics of one layer's routing of one micro batch; a loss without weight is 0.

    If ranks share the sequences, the losses are of the whole micro batch, except the z-loss: that
    is the mean of the ranks'. Everything else is of this rank's tokens.

    Args:
        counts_E: fp32 tokens that chose each expert, over all k choices.
        sequences: B of the micro batch.
        dropped: fp32 [] share of choices dropped, passed through.
        fractions_E: choices per token of each expert over the global batch; by default from
            ``counts_E``.
        token_parts: the ranks that share the micro batch's sequences.
    """
    own_fractions_E = counts_E / routing.probs_TE.shape[0]
    mean_probs_E = routing.probs_TE.mean(dim=0)
    mean_of_parts = _unchanged if token_parts is None else token_parts.mean
    if token_parts is not None:
        # One collective for both.
        both_2E = torch.stack((own_fractions_E, mean_probs_E))
        own_fractions_E, mean_probs_E = token_parts.mean(both_2E)
    if fractions_E is None:
        fractions_E = own_fractions_E
    batch = RoutedBatch(routing, counts_E, fractions_E, mean_probs_E, sequences, mean_of_parts)
    zero = counts_E.new_zeros(())
    losses = [
        LOSSES[name](batch) if weight or name in ALWAYS_COMPUTED else zero
        for name, weight in loss_weights(config).items()
    ]
    return RouterStatistics(torch.stack(losses), counts_E, _mean_entropy(routing), dropped)


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


@torch.no_grad()
def _mean_entropy(routing: Routing) -> torch.Tensor:
    if routing.entropy_T is not None:
        return routing.entropy_T.mean()
    return -torch.special.xlogy(routing.probs_TE, routing.probs_TE).sum(dim=-1).mean()
