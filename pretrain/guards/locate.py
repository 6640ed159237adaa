"""Where in a step a value stopped being finite.

The step is repeated with every local gradient watched, and refused.

A run in which all is well pays nothing for it: nothing is watched until a step was skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from data_pipeline.loading.batch import Batch
from pretrain.engine.engine import Engine


@dataclass(frozen=True)
class NonFinite:
    """A micro batch of one rank with a loss or gradient that is not finite.

    Attributes:
        rank: the one that computed it.
        micro_batch: of this rank in the step, from 0.
        where: ``loss``, or the weight whose gradient was the first in the backward pass.
    """

    rank: int
    micro_batch: int
    where: str


def find_non_finite(engine: Engine, micro_batches: list[Batch]) -> list[NonFinite]:
    """Find the micro batches of all ranks whose own loss or gradient is not finite.

    Weights, optimizer, random state, usage counters and DeepSpeed's counters are afterwards what
    they were. In fp16 the repetition has no loss scale, so that what is found is no fault of the
    scale. Dropout and router noise are drawn anew. Every rank must call it.

    Args:
        micro_batches: this rank's, as :meth:`Engine.train_step` takes them.

    Returns:
        The same list on every rank; empty if it does not happen again: the loss scale was too
        large, or the
        hardware erred.
    """
    watch = _Watch(engine)
    with _as_before(engine), watch:
        result = engine.train_step(
            micro_batches, 0.0, should_skip=lambda loss, norm: True, after_backward=watch.next
        )
    found: dict[int, str] = dict(watch.found)
    found |= {
        number: "loss"
        for number, loss in enumerate(result.micro_losses)
        if not bool(loss.isfinite())
    }
    mine = [
        NonFinite(engine.topology.rank, number, where) for number, where in sorted(found.items())
    ]
    everything = [entry for entries in engine.topology.all_gather(mine) for entry in entries]
    # If a loss is to blame, what it does to gradients, also to those of experts on other ranks,
    # says nothing new.
    return [entry for entry in everything if entry.where == "loss"] or everything


@contextmanager
def _as_before(engine: Engine) -> Iterator[None]:
    """Restore what a refused step moves besides weights and optimizer state.

    The loss scale of fp16 is 1 meanwhile.
    """
    device = engine.topology.device
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    counters = {
        name: getattr(engine.deepspeed, name)
        for name in ("global_steps", "global_samples", "skipped_steps")
    }
    usage = engine.usage.copy()
    engine.veto.keeps_loss_scale = True
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        engine.loss_scale.removed(),
    ):
        yield
    engine.veto.keeps_loss_scale = False
    engine.usage.restore(usage)
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for name, value in counters.items():
        setattr(engine.deepspeed, name, value)


class _Watch:
    """Looks at each weight's gradient as a micro batch's backward pass makes it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.found: dict[int, str] = {}
        self._number = 0
        self._collected: dict[str, int] = {}  # how many factors of each table were looked at
        self._handles: list[Any] = []

    def next(self, number: int) -> None:
        """Micro batch ``number`` is done; what it has left in the tables is looked at too."""
        sparse = self.engine.sparse_optimizer
        for name, table in sparse.tables.items() if sparse is not None else ():
            collected = table.collected or []
            new = collected[self._collected.get(name, 0) :]
            self._collected[name] = len(collected)
            if any(
                not bool(part.c_P.isfinite().all() and part.x_TD.isfinite().all()) for part in new
            ):
                self.found.setdefault(number, name)
        self._number = number + 1

    def __enter__(self) -> None:
        for name, parameter in self.engine.model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(partial(self._look, name)))

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, name: str, gradient: torch.Tensor) -> None:
        if self._number not in self.found and not bool(gradient.isfinite().all()):
            self.found[self._number] = name
