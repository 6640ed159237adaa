"""How often each expert was chosen in training, counted on the device and read once per window."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from pretrain.engine.step_hooks import StepHook, Update
from pretrain.engine.topology import Topology
from pretrain.model.moe.base import MoELayer


class UsageCounts(NamedTuple):
    """A copy of the counters: int64 [L, E] of routed layers, and [E] of each table layer."""

    routed_LE: torch.Tensor | None
    retrieved_E: list[torch.Tensor]


class UsageCounter(StepHook):
    """Counts choices before any drop, those of skipped steps included."""

    def __init__(self, model: nn.Module, topology: Topology) -> None:
        self._topology = topology
        self._layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        self._routed_LE: torch.Tensor | None = None

    def after_update(self, update: Update) -> None:
        """Add the routers' choices of the step; table layers count in their own forward pass."""
        if update.router is None:
            return
        # fp32 counts exactly within a step, but not over many: from 2**24 on, adding 1 changes
        # nothing.
        counts_LE = update.router.counts_LE.long()
        if self._routed_LE is None:
            self._routed_LE = counts_LE
        else:
            self._routed_LE.add_(counts_LE)

    @torch.no_grad()
    def take(self) -> torch.Tensor | None:
        """Read and reset the counters: int64 [L, E] on the CPU, summed over all ranks.

        Layers are those of ``ModelConfig.routed_layers``, in that order. None for a dense model,
        and if there was no step since the last call in this process. Every rank must call it,
        because it is one all-reduce.
        """
        usage_LE = self._routed_LE
        self._routed_LE = None
        # A model has either routers or layers that count themselves, never both.
        if counted := self._counted_by_layers():
            usage_LE = torch.stack(counted)
            for counts_E in counted:
                counts_E.zero_()
        return None if usage_LE is None else self._topology.all_reduce_sum(usage_LE).cpu()

    def copy(self) -> UsageCounts:
        """The current counters of this rank, for :meth:`restore`."""
        routed_LE = self._routed_LE
        return UsageCounts(
            None if routed_LE is None else routed_LE.clone(),
            [counts_E.clone() for counts_E in self._counted_by_layers()],
        )

    def restore(self, counts: UsageCounts) -> None:
        """Set the counters of this rank to a copy."""
        self._routed_LE = counts.routed_LE
        for counts_E, saved_E in zip(self._counted_by_layers(), counts.retrieved_E, strict=True):
            counts_E.copy_(saved_E)

    def _counted_by_layers(self) -> list[torch.Tensor]:
        """The counters of layers that count their experts' choices themselves."""
        counters = [layer.counted_choices_E for layer in self._layers]
        return [counts_E for counts_E in counters if counts_E is not None]
