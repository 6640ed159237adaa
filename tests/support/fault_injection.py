"""Wrong numbers, put into a chosen rank, micro batch and place of a step, as a fault of data or
hardware would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pretrain.checkpoint.weights import is_expert
from pretrain.engine.engine import Engine
from pretrain.model.moe.tables.products import Factors
from pretrain.training.trainer import Trainer

PLACES = ("loss", "loss_alone", "dense", "expert", "table")


class Injection:
    """While ``armed``, one micro batch of each step on one rank has its loss, or the gradient of
    one weight, multiplied by ``factor``, or an infinite
    loss whose gradient is that of the finite one.

    Attributes:
        weight: whose gradient it is; "loss" for the loss.
    """

    def __init__(
        self, engine: Engine, rank: int, micro_batch: int, place: str, factor: float = torch.nan
    ) -> None:
        self.armed = False
        self.factor = factor
        self.weight = "loss"
        self._micro_batch = -1  # that of the forward pass that ran last
        self._concerned = engine.topology.rank == rank
        self._wanted, self._accumulation = (
            micro_batch,
            engine.deepspeed.gradient_accumulation_steps(),
        )
        forward = engine.model.forward

        def counted(*inputs: Any) -> Any:
            if engine.model.training:
                self._micro_batch = (self._micro_batch + 1) % self._accumulation
            output = forward(*inputs)
            if place == "loss" and self._now():
                return output._replace(loss=output.loss * factor, nll=output.nll * factor)
            if place == "loss_alone" and self._now():
                return output._replace(loss=output.loss + torch.inf, nll=output.nll + torch.inf)
            return output

        engine.model.forward = counted
        if place == "table":
            self.weight, table = next(iter(engine.sparse_optimizer.tables.items()))
            table.take_gradient = self._poisoned(table.take_gradient)
        elif place not in ("loss", "loss_alone"):
            named = [
                (name, p)
                for name, p in engine.model.named_parameters()
                if is_expert(p) == (place == "expert") and p.requires_grad
            ]
            self.weight, parameter = named[-1]
            parameter.register_hook(lambda gradient: gradient * factor if self._now() else gradient)

    def _now(self) -> bool:
        return self.armed and self._concerned and self._micro_batch == self._wanted

    def _poisoned(self, take_gradient: Callable[..., Any]) -> Callable[..., Any]:
        def poisoned(factors: Factors, *rest: Any) -> Any:
            return take_gradient(
                factors._replace(c_P=factors.c_P * self.factor) if self._now() else factors, *rest
            )

        return poisoned


def poison_batches(trainer: Trainer, injection: Injection, batches: set[int]) -> None:
    """Arms the injection whenever training takes one of these batches (from 0, in the order of the
    data), whatever step takes it.
    """
    loader, read = trainer.loader, trainer.loader.step_batches

    def armed(step: int) -> Any:
        injection.armed = (
            loader.position(step) // trainer.engine.recipe.train.global_batch_size in batches
        )
        return read(step)

    loader.step_batches = armed
