"""PEER (He 2024, "Mixture of a Million Experts"): each token uses a few of very many tiny experts.

h is the number of heads, P the size of a head's query.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .attention_moe_pretrain import NORMS
from .configuration_moe_pretrain import MoePretrainConfig
from .experts_moe_pretrain import GATED, UNGATED, SharedExperts, rows_before


class RunningNorm(nn.Module):
    """Batch norm with the statistics of training (Ioffe & Szegedy 2015)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps
        self.running_mean = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.running_variance = nn.Parameter(torch.ones(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = (x.float() - self.running_mean) * torch.rsqrt(self.running_variance + self.eps)
        return normed.to(x.dtype) * self.weight + self.bias


class ProductKeys(nn.Module):
    """Chooses the experts of each head by product keys.

    Expert i * J + j has the score of sub-key i with the query's first part plus that of sub-key j
    with its second part, so that the best K of I * J experts are found among I + J scores.
    """

    def __init__(self, config: MoePretrainConfig, form: SimpleNamespace) -> None:
        super().__init__()
        self.num_heads = form.num_heads
        self.top_k = form.top_k
        self.query = nn.Linear(
            config.hidden_size, form.num_heads * form.query_dim, bias=form.query_bias
        )
        norms: dict[str, Callable[..., nn.Module]] = {
            **NORMS,
            "batch_norm": RunningNorm,
            "none": lambda size, eps: nn.Identity(),
        }
        self.norm = norms[form.query_norm](form.query_dim, eps=config.norm["eps"])
        part = form.query_dim // len(form.product_key_sizes)
        self.keys = nn.ParameterList(torch.empty(size, part) for size in form.product_key_sizes)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] -> weights, fp32, which sum to 1 a head, and expert indices; both [T, h, K]."""
        query_ThP = self.norm(self.query(x_TD).unflatten(1, (self.num_heads, -1))).float()
        best_ThK = query_ThP.new_zeros(*query_ThP.shape[:2], 1)
        experts_ThK = torch.zeros_like(query_ThP[..., :1], dtype=torch.int64)
        for part, keys in zip(query_ThP.chunk(len(self.keys), dim=-1), self.keys, strict=True):
            # The best K sums have their parts among each dimension's best K.
            scores, ids = (part @ keys.float().T).topk(min(self.top_k, len(keys)), dim=-1)
            sums = (best_ThK[..., None] + scores[..., None, :]).flatten(2)
            numbers = (experts_ThK[..., None] * len(keys) + ids[..., None, :]).flatten(2)
            best_ThK, chosen = sums.topk(min(self.top_k, sums.shape[-1]), dim=-1)
            experts_ThK = numbers.gather(2, chosen)
        return best_ThK.softmax(dim=-1), experts_ThK


class PEERExperts(nn.Module):
    """Tables in fp32, whatever the model's precision: ``up_rows``, ``gate_rows`` and ``down_rows``.

    Each is [E, F, D].
    """

    def __init__(self, config: MoePretrainConfig, form: SimpleNamespace) -> None:
        super().__init__()
        self.form = config.feed_forward
        E = math.prod(form.product_key_sizes)
        D = config.hidden_size
        rows = rows_before(self.form, form.moe_intermediate_size)
        self.up_rows = nn.Parameter(torch.empty(E, rows, D))
        self.gate_rows = (
            nn.Parameter(torch.empty(E, rows, D)) if self.form["kind"] in GATED else None
        )
        self.down_rows = nn.Parameter(torch.empty(E, form.moe_intermediate_size, D))

    def forward(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """fp32 [T, D] -> the weighted sum of the chosen experts' outputs [T, D]."""

        def products(rows: Tensor) -> Tensor:
            return torch.einsum("td,tkfd->tkf", x_TD, rows[experts_TK])

        up_TKF = products(self.up_rows)
        if self.gate_rows is None:
            hidden_TKF = UNGATED[self.form["kind"]](self.form, up_TKF)
        else:
            hidden_TKF = GATED[self.form["kind"]](self.form, products(self.gate_rows), up_TKF)
        return torch.einsum(
            "tkf,tkfd->td", hidden_TKF * weights_TK[..., None], self.down_rows[experts_TK]
        )


class PEER(nn.Module):
    """The sum of all heads' experts, and of shared experts."""

    def __init__(self, config: MoePretrainConfig) -> None:
        super().__init__()
        assert config.moe is not None
        form = SimpleNamespace(**config.moe)
        self.retrieval = ProductKeys(config, form)
        self.experts = PEERExperts(config, form)
        self.shared = SharedExperts(config) if form.shared_intermediate_size else None

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x_TD = x_BSD.flatten(0, 1)
        weights_ThK, experts_ThK = self.retrieval(x_TD)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        # One head at a time: the gathered rows of a head are K * F times as large as its input.
        for head in range(weights_ThK.shape[1]):
            y_TD += self.experts(x_TD.float(), weights_ThK[:, head], experts_ThK[:, head])
        y_TD = y_TD.to(x_TD.dtype)
        return (y_TD if self.shared is None else y_TD + self.shared(x_TD)).view_as(x_BSD)
