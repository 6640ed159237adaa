"""The module around every kind of router: matrices, balancing bias, and the choice of experts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from pretrain.model.fp32 import KeepsFp32
from pretrain.model.kernels.selection import use_fused
from pretrain.model.moe.base import RoutingRecord
from pretrain.model.moe.routers import NoisyTopK, SigmoidTopK, SoftmaxTopK
from pretrain.model.moe.routers.interface import ExpertGroups, Router


class Routing(NamedTuple):
    """A routing decision, fp32.

    Attributes:
        logits_TE: what the scores were made from.
        probs_TE: each token's distribution over the experts, for losses and statistics.
        topk_ids_TK: chosen experts, int64.
        topk_weights_TK: weights of their outputs, differentiable.
        logsumexp_T: of each token's logits, if it is computed already.
        entropy_T: of each token's distribution, nats, without gradient, if it is computed already.
    """

    logits_TE: torch.Tensor
    probs_TE: torch.Tensor
    topk_ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor
    logsumexp_T: torch.Tensor | None = None
    entropy_T: torch.Tensor | None = None


class TopKRouter(KeepsFp32):
    """A router in fp32, whatever the model's precision.

    A bf16 product moves logits enough to flip close choices.

    Args:
        gate: the matrix [E, D], and the bias if the kind has one.
        balanced_by_bias: whether there is a ``balance_bias`` [E], added to the scores when experts
            are chosen, never to their weights.
    """

    balance_bias: torch.Tensor | None

    def __init__(self, kind: Router, gate: nn.Linear, top_k: int, balanced_by_bias: bool) -> None:
        super().__init__()
        self.kind = kind
        self.gate = gate
        self.top_k = top_k
        self.noise = (
            nn.Linear(gate.in_features, gate.out_features, bias=False)
            if kind.learned_noise
            else None
        )
        self.register_buffer(
            "balance_bias", torch.zeros(gate.out_features) if balanced_by_bias else None
        )

    def forward(self, x_TD: torch.Tensor, record: RoutingRecord | None = None) -> Routing:
        """[T, D] -> the decision.

        A filled ``record`` repeats its choice, an empty one is filled.
        """
        x_TD = x_TD.float()
        # Switch Transformers, section 2.2: multiplicative noise on the input, in training only.
        if self.training and self.kind.jitter:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(
                1.0 - self.kind.jitter, 1.0 + self.kind.jitter
            )
        # Autocast would multiply in bf16 in spite of fp32 inputs.
        with _no_autocast(x_TD.device.type):
            bias = None if self.gate.bias is None else self.gate.bias.float()
            logits_TE = functional.linear(x_TD, self.gate.weight.float(), bias)
            if self.noise is not None and self.training:
                logits_TE = self.kind.noisy_logits(
                    logits_TE, functional.linear(x_TD, self.noise.weight.float())
                )
        temperature = _fused_temperature(self.kind)
        if temperature is not None and use_fused(logits_TE):
            return self._fused(logits_TE, temperature, record)
        scores_TE = self.kind.scores(logits_TE)
        if record is not None and record.topk_ids_TK is not None:
            topk_ids_TK = record.topk_ids_TK
        else:
            topk_ids_TK = self._choose(scores_TE.detach())
            if record is not None:
                record.topk_ids_TK = topk_ids_TK
        # Weights come from the unbiased scores: the balancing bias chooses and never weighs.
        weights_TK = self.kind.weights(scores_TE.gather(1, topk_ids_TK))
        return Routing(logits_TE, self.kind.probabilities(scores_TE), topk_ids_TK, weights_TK)

    def _fused(
        self, logits_TE: torch.Tensor, temperature: float, record: RoutingRecord | None
    ) -> Routing:
        """The decision by one kernel, which computes the statistics of each token too."""
        from pretrain.model.kernels.router_triton import route

        probs_TE, ids_TK, weights_TK, logsumexp_T, entropy_T = route(
            logits_TE,
            self.balance_bias,
            None if record is None else record.topk_ids_TK,
            self.top_k,
            isinstance(self.kind, SigmoidTopK),
            temperature,
            self.kind.norm_topk_prob,
            self.kind.routed_scaling_factor,
        )
        if record is not None and record.topk_ids_TK is None:
            record.topk_ids_TK = ids_TK
        return Routing(logits_TE, probs_TE, ids_TK, weights_TK, logsumexp_T, entropy_T.detach())

    def _choose(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """The ids of each token's experts, [T, K] int64, best first."""
        if self.balance_bias is not None:
            scores_TE = scores_TE + self.balance_bias
        # Groups are chosen by biased scores too (DeepSeek-V3).
        if self.kind.groups is not None:
            scores_TE = scores_TE.masked_fill(
                ~_in_best_groups(scores_TE, self.kind.groups), float("-inf")
            )
        return scores_TE.topk(self.top_k, dim=-1).indices

    @torch.no_grad()
    def move_balance_bias(self, load_E: torch.Tensor, rate: float) -> None:
        """One step of balancing by bias (Wang et al. 2024, algorithm 1).

        Then the mean is subtracted: only differences choose, and without it the bias would drift.

        Args:
            load_E: tokens that chose each expert over the whole global batch.
        """
        if self.balance_bias is not None:
            self.balance_bias += rate * torch.sign(load_E.mean() - load_E)
            self.balance_bias -= self.balance_bias.mean()


def _fused_temperature(kind: Router) -> float | None:
    """What the fused kernel divides the logits of this kind by; None if it has no such kind."""
    if kind.groups is not None:
        return None
    # The exact classes: a subclass may have other scores.
    if type(kind) is SoftmaxTopK:
        return kind.temperature
    return 1.0 if type(kind) in (NoisyTopK, SigmoidTopK) else None


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    return (
        torch.autocast(device_type, enabled=False)
        if torch.is_autocast_enabled(device_type)
        else nullcontext()
    )


def _in_best_groups(scores_TE: torch.Tensor, groups: ExpertGroups) -> torch.Tensor:
    """Whether an expert is in one of its token's best groups, [T, E] bool."""
    grouped_TGe = scores_TE.unflatten(-1, (groups.num_groups, -1))
    best = 1 if groups.score == "max" else 2
    # A group's score is that of its best expert (DeepSeek-V2), or the sum of its two best (V3).
    kept_TG = (
        grouped_TGe.topk(best, dim=-1).values.sum(dim=-1).topk(groups.top_k_groups, dim=-1).indices
    )
    return (
        torch.zeros_like(grouped_TGe, dtype=torch.bool)
        .scatter(1, kept_TG[..., None].expand(-1, -1, grouped_TGe.shape[2]), True)
        .flatten(1)
    )
