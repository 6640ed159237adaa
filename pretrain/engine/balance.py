"""Balancing biases of routers, moved after each step by the load of the whole global batch."""

from __future__ import annotations

from torch import nn

from pretrain.engine.phases import FrozenParameters
from pretrain.engine.step_hooks import StepHook, Update
from pretrain.engine.topology import Topology
from pretrain.model.moe.router import TopKRouter


class BalanceBiases(StepHook):
    """Loss-free load balancing (Wang et al. 2024).

    Args:
        frozen: a router whose gate is frozen keeps its bias.
    """

    def __init__(
        self, model: nn.Module, frozen: FrozenParameters | None, topology: Topology
    ) -> None:
        self._routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        self._frozen = frozen
        self._topology = topology

    def after_update(self, update: Update) -> None:
        """Move the biases of every rank's copy alike; a skipped step moves none."""
        if update.router is None or not update.applied or update.balance_rate <= 0:
            return
        # Cloned: the reduction works in place, and these counts belong to the step's result, which
        # is reduced later.
        loads_LE = self._topology.all_reduce_sum(update.router.counts_LE.clone())
        # Modules in the order of their layers, as the statistics are stacked.
        for router, load_E in zip(self._routers, loads_LE, strict=True):
            if self._frozen is None or id(router.gate.weight) not in self._frozen.ids:
                router.move_balance_bias(load_E, update.balance_rate)
