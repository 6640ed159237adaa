"""Numbers that are not finite, put into a chosen rank, micro batch and place of a step, as a fault of data or hardware would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pretrain.checkpoint.weights import is_expert
from pretrain.engine.engine import Engine
from pretrain.model.moe.row_products import Factors

PLACES = ("loss", "dense", "expert", "table")


class Injection:
    """While ``armed``, one micro batch of each step on one rank gets NaN in its loss, or in the gradient of one weight.

    Attributes:
        weight: whose gradient it is; "loss" for the loss.
    """

    def __init__(self, engine: Engine, rank: int, micro_batch: int, place: str) -> None:
        self.armed = False
        self.weight = "loss"
        self._micro_batch = -1  # that of the forward pass that ran last
        self._concerned = engine.topology.rank == rank
        self._wanted, self._accumulation = micro_batch, engine.accumulation_steps
        forward = engine.model.forward

        def counted(*inputs: Any) -> Any:
            if engine.model.training:
                self._micro_batch = (self._micro_batch + 1) % self._accumulation
            output = forward(*inputs)
            return output._replace(loss=output.loss * torch.nan) if place == "loss" and self._now() else output

        engine.model.forward = counted
        if place == "table":
            self.weight, table = next(iter(engine.rows.tables.items()))
            table.take_gradient = self._poisoned(table.take_gradient)
        elif place != "loss":
            named = [(name, p) for name, p in engine.model.named_parameters() if is_expert(p) == (place == "expert") and p.requires_grad]
            self.weight, parameter = named[-1]
            parameter.register_hook(lambda gradient: torch.full_like(gradient, torch.nan) if self._now() else gradient)

    def _now(self) -> bool:
        return self.armed and self._concerned and self._micro_batch == self._wanted

    def _poisoned(self, take_gradient: Callable[..., Any]) -> Callable[..., Any]:
        def poisoned(factors: Factors, *rest: Any) -> Any:
            return take_gradient(factors._replace(c_P=factors.c_P * torch.nan) if self._now() else factors, *rest)

        return poisoned
