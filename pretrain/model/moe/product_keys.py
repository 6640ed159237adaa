"""Retrieval by product keys: the exact best of very many experts, from few scores per dimension.

Lample et al. 2019; He 2024, section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from pretrain.model.fp32 import KeepsFp32
from pretrain.model.moe.base import RoutingRecord
from pretrain.model.moe.config import PEERConfig
from pretrain.model.norm import LayerNorm, RMSNorm


class Retrieval(NamedTuple):
    """Each head's experts and their weights, both [T, heads, K].

    The ids are int64; the weights are fp32, differentiable, and sum to 1 over each head's experts.
    """

    ids_ThK: torch.Tensor
    weights_ThK: torch.Tensor


class RunningStatistics(KeepsFp32):
    """Exponential averages of mean and variance over tokens (Ioffe & Szegedy 2015).

    ``seen`` sums up what was observed since the averages were last moved.
    """

    momentum = 0.1
    mean: torch.Tensor
    variance: torch.Tensor
    seen: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))
        # Rows: count, sum, sum of squares.
        self.register_buffer("seen", torch.zeros(3, size), persistent=False)

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        """Add the tokens of one forward pass, [..., size], to ``seen``."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.seen += torch.stack(
            (torch.full_like(rows[0], rows.shape[0]), rows.sum(dim=0), rows.square().sum(dim=0))
        )

    @torch.no_grad()
    def absorb(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move towards what all ranks have seen since the last time; the same on each of them."""
        # Cloned, because the reduction works in place.
        count, total, squares = sum_over_ranks(self.seen.clone()).unbind(0)
        if count[0] > 0:
            mean = total / count
            self.mean.lerp_(mean, self.momentum)
            # Rounding can make E[x^2] - E[x]^2 negative.
            self.variance.lerp_((squares / count - mean.square()).clamp_min(0.0), self.momentum)
        self.forget()

    def forget(self) -> None:
        """Drop what was seen since the last time, because the step is skipped."""
        self.seen.zero_()


class RunningNorm(nn.Module):
    """Batch norm by running statistics in training too: a batch's own would leak later tokens."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.statistics = RunningStatistics(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size]."""
        normed = (x - self.statistics.mean) * torch.rsqrt(self.statistics.variance + self.eps)
        return normed.to(x.dtype) * self.weight + self.bias


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rms_norm": RMSNorm,
    "layer_norm": LayerNorm,
    "batch_norm": RunningNorm,
    "none": lambda size, eps: nn.Identity(),
}


class ProductKeys(nn.Module):
    """The queries' projection and norm, and the sub-keys that all heads share.

    ``keys_d`` are those of dimension d, [size, query_dim / dimensions].
    """

    def __init__(self, config: PEERConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.sizes = config.product_key_sizes
        self.num_heads = config.num_heads
        self.top_k = config.top_k
        self.part = config.query_dim // len(self.sizes)
        self.query = nn.Linear(
            hidden_size, self.num_heads * config.query_dim, bias=config.query_bias
        )
        self.norm = NORMS[config.query_norm](config.query_dim, eps)
        for dimension, size in enumerate(self.sizes):
            self.register_parameter(f"keys_{dimension}", nn.Parameter(torch.empty(size, self.part)))

    def forward(self, x_TD: torch.Tensor, record: RoutingRecord | None = None) -> Retrieval:
        """[T, D] -> each head's experts.

        A filled ``record`` repeats its choice, an empty one is filled.
        """
        repeated = record is not None and record.topk_ids_TK is not None
        scores = self.scores(x_TD, observe=self.training and not repeated)
        ids_ThK = (
            record.topk_ids_TK
            if record is not None and repeated
            else best_products([s.detach() for s in scores], self.top_k)
        )
        assert ids_ThK is not None
        if record is not None:
            record.topk_ids_TK = ids_ThK
        # The choice has no gradient; keys and queries learn through the weights of the chosen
        # experts.
        return Retrieval(ids_ThK, product_scores(scores, ids_ThK).softmax(dim=-1))

    def scores(self, x_TD: torch.Tensor, observe: bool = False) -> list[torch.Tensor]:
        """[T, D] -> the scores of each dimension's sub-keys, [T, heads, size] fp32."""
        # [T, heads * query_dim] -> [T, heads, query_dim].
        query_Thq = self.query(x_TD).unflatten(-1, (self.num_heads, -1))
        if observe and isinstance(self.norm, RunningNorm):
            self.norm.statistics.observe(query_Thq)
        # fp32: the sums of several parts' scores decide close choices.
        parts = self.norm(query_Thq).float().split(self.part, dim=-1)
        return [
            part @ getattr(self, f"keys_{dimension}").float().T
            for dimension, part in enumerate(parts)
        ]


def best_products(scores: list[torch.Tensor], top_k: int) -> torch.Tensor:
    """The ``top_k`` products of sub-keys with the largest sums of scores, best first.

    [..., size] per dimension -> [..., K] int64. A product's id counts in mixed radix, the last
    dimension fastest, so that every expert is reached: ((i * J + j) * L + l).

    The result is exact: a product among the best k has its first dimensions among the best k of
    these; otherwise k other prefixes, each with the same last sub-key, would be better.
    """
    best, ids = scores[0].topk(min(top_k, scores[0].shape[-1]), dim=-1)
    for scores_d in scores[1:]:
        size = scores_d.shape[-1]
        best_d, ids_d = scores_d.topk(min(top_k, size), dim=-1)
        # k prefixes x k sub-keys: k^2 candidates, whatever the number of experts.
        sums = (best[..., :, None] + best_d[..., None, :]).flatten(-2)
        candidates = (ids[..., :, None] * size + ids_d[..., None, :]).flatten(-2)
        best, chosen = sums.topk(min(top_k, sums.shape[-1]), dim=-1)
        ids = candidates.gather(-1, chosen)
    return ids


def product_scores(scores: list[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The scores of the products ``ids`` [..., K], differentiable: sums over their dimensions."""
    total: torch.Tensor | float = 0.0
    # The last dimension is the fastest digit of the mixed radix, so it is read first.
    for scores_d in reversed(scores):
        size = scores_d.shape[-1]
        total = scores_d.gather(-1, ids % size) + total
        ids = ids // size
    assert isinstance(total, torch.Tensor)
    return total
