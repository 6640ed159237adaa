"""The dense feed-forward, one class per kind; routed and shared experts have the same form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pretrain.model.config import Clamped, FeedForwardConfig, GELUConfig
from pretrain.model.kernels.gated import gated, use_fused_gate
from pretrain.model.tensor_shards import cut_columns, cut_rows
from pretrain.model.token_parallel import TensorParallel


class FeedForward(nn.Module, ABC):
    """down(dropout(activate(gate(x), up(x)))); each kind defines its activation."""

    def __init__(
        self,
        config: FeedForwardConfig,
        hidden_size: int,
        intermediate_size: int,
        dropout: float = 0.0,
        output_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        rows = config.expansion * intermediate_size
        self.config = config
        self.dropout = dropout
        self.output_dropout = output_dropout
        self.gate_proj = nn.Linear(hidden_size, rows, bias=config.bias) if config.gated else None
        self.up_proj = nn.Linear(hidden_size, rows, bias=config.bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=config.bias)
        self._tensor: TensorParallel | None = None

    def share(self, tensor: TensorParallel) -> None:
        """Keep this rank's part of the hidden units."""
        self._tensor = tensor
        cut_columns(tensor, self.gate_proj, self.up_proj)
        cut_rows(tensor, self.down_proj)

    @staticmethod
    @abstractmethod
    def activate(config: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Join the first two products, [..., expansion * F] each -> [..., F].

        Kinds without a gate have one product, given in two parts to be concatenated: either its two
        halves (stacked experts) or the whole product and an empty tensor (dense layers).
        """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        if self._tensor is not None:
            x = self._tensor.gather(x, dim=x.dim() - 2)
        up = self.up_proj(x)
        # Without a gate: the whole product and an empty tensor, which activate() concatenates.
        first, second = (self.gate_proj(x), up) if self.gate_proj is not None else (up, up[..., :0])
        hidden = self.activate(self.config, first, second)
        y = self.down_proj(functional.dropout(hidden, self.dropout, self.training))
        if self._tensor is not None:
            y = self._tensor.scatter_sum(y, dim=y.dim() - 2)
        return functional.dropout(y, self.output_dropout, self.training)


class SwiGLU(FeedForward):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    @staticmethod
    def activate(config: FeedForwardConfig, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if use_fused_gate(gate, up):
            return gated(gate, up)
        return functional.silu(gate) * up


class GELU(FeedForward):
    """down(gelu(up(x))) (Hendrycks & Gimpel 2016)."""

    @staticmethod
    def activate(config: GELUConfig, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return functional.gelu(torch.cat((gate, up), dim=-1), approximate=config.approximate)


class SiLU(FeedForward):
    """down(silu(up(x))) (Elfwing et al. 2017)."""

    @staticmethod
    def activate(config: FeedForwardConfig, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return functional.silu(torch.cat((gate, up), dim=-1))


class ClampedSwiGLU(FeedForward):
    """down(g * sigmoid(alpha * g) * (u + 1)), with both products clamped (gpt-oss).

    g = min(gate(x), limit) and u = up(x) within +-limit.
    """

    @staticmethod
    def activate(config: Clamped, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if use_fused_gate(gate, up):
            return gated(gate, up, config.alpha, config.limit)
        # The gate is clamped from above only: silu is bounded from below.
        gate = gate.clamp(max=config.limit)
        return (
            gate * torch.sigmoid(config.alpha * gate) * (up.clamp(-config.limit, config.limit) + 1)
        )


class ProductSwiGLU(FeedForward):
    """:class:`ClampedSwiGLU` of the even and the odd elements of gate(x) * up(x) (Project 828)."""

    @staticmethod
    def activate(config: Clamped, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        product = gate * up
        return ClampedSwiGLU.activate(config, product[..., 0::2], product[..., 1::2])
