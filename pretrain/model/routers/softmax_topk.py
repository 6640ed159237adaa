"""Softmax, then the k largest probabilities (Shazeer et al. 2017; Mixtral, Qwen-MoE, OLMoE)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from pretrain.model.moe.interface import RoutingRecord


class Routing(NamedTuple):
    """A routing decision: logits [T, E] fp32, chosen experts [T, K] int64, their weights [T, K] fp32 (differentiable)."""

    logits_TE: torch.Tensor
    topk_ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor


class SoftmaxTopKRouter(nn.Module):
    """Everything in fp32 whatever the model's precision: a bf16 product moves logits enough to flip close choices."""

    def __init__(self, gate: nn.Linear, top_k: int, norm_topk_prob: bool) -> None:
        super().__init__()
        self.gate = gate
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob

    def forward(self, x_TD: torch.Tensor, record: RoutingRecord | None = None) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = functional.linear(x_TD.float(), self.gate.weight.float())
        probs_TE = logits_TE.softmax(dim=-1)
        if record is not None and record.topk_ids_TK is not None:
            topk_ids_TK = record.topk_ids_TK
        else:
            topk_ids_TK = probs_TE.detach().topk(self.top_k, dim=-1).indices
            if record is not None:
                record.topk_ids_TK = topk_ids_TK
        weights_TK = probs_TE.gather(1, topk_ids_TK)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return Routing(logits_TE, topk_ids_TK, weights_TK)
