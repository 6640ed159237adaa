"""Finds where in a step a value stopped being finite.

The step is repeated with a hook on every local gradient, and its update is refused. A run without
such steps pays nothing: there are no hooks until a step was skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.hooks import RemovableHandle

from data_pipeline.loading.batch import Batch
from pretrain.engine.engine import Engine


@dataclass(frozen=True)
class NonFinite:
    """A micro batch of one rank with a loss or gradient that is not finite.

    Attributes:
        rank: the one that computed it.
        micro_batch: of this rank in the step, from 0.
        where: ``loss``, or the weight whose gradient was the first one in the backward pass.
    """

    rank: int
    micro_batch: int
    where: str


def find_non_finite(engine: Engine, micro_batches: list[Batch]) -> list[NonFinite]:
    """Find the micro batches of all ranks whose loss or gradient is not finite.

    Weights, optimizer, random state, usage counters and DeepSpeed's counters are unchanged
    afterwards. In fp16 the repetition has no loss scale, so that what is found is not due to the
    scale. Dropout and router noise are drawn anew. Every rank must call it.

    Args:
        micro_batches: this rank's, as :meth:`Engine.train_step` takes them.

    Returns:
        The same list on every rank; empty if it does not happen again, because the loss scale was
        too large or the hardware erred.
    """
    watch = _Watch(engine)
    # A learning rate of 0 and a refused update: nothing of the repetition may stay.
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
    # A loss that is not finite spoils the gradients, also those of experts on other ranks: they say
    # nothing new.
    return [entry for entry in everything if entry.where == "loss"] or everything


@contextmanager
def _as_before(engine: Engine) -> Iterator[None]:
    """Restore what even a refused step changes.

    Inside, the loss scale of fp16 is 1.
    """
    device = engine.topology.device
    # Learning rates, the counters of DeepSpeed's engine, and the experts' counts.
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
    """Looks at each weight's gradient when a micro batch's backward pass makes it.

    Attributes:
        found: the first weight whose gradient is not finite, by the micro batch's number.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.found: dict[int, str] = {}
        self._number = 0
        # How many factors of each table were looked at.
        self._collected: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def next(self, number: int) -> None:
        """Look at what micro batch ``number``, which is done, has left in the tables."""
        # Tables have no dense gradient, and so no hook: they collect its factors.
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
        # The first one in the backward pass is nearest to the cause; the others follow from it.
        if self._number not in self.found and not bool(gradient.isfinite().all()):
            self.found[self._number] = name
