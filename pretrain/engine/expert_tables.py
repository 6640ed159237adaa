"""Tables of many small experts (PEER), trained in parallel to DeepSpeed's engine.

DeepSpeed would give the tables dense gradients and, in its checkpoints, one file per expert.
"""

from __future__ import annotations

import math

import torch
from torch import distributed

from pretrain.config.recipe import Recipe
from pretrain.engine.loss_scale import LossScale
from pretrain.engine.sparse_optimizer import SparseOptimizer, TableGroups
from pretrain.engine.step_hooks import StepHook, Update
from pretrain.engine.topology import Topology
from pretrain.model.decoder import DecoderLM
from pretrain.model.moe.base import MoELayer
from pretrain.model.moe.product_keys import RunningStatistics
from pretrain.model.moe.tables.products import ExpertTable


def take_expert_tables(
    model: DecoderLM, recipe: Recipe, shards: int, topology: Topology
) -> SparseOptimizer | None:
    """Take the tables of a PEER model out of its parameters, before DeepSpeed sees them.

    None for other models. Every rank must call it, because it makes process groups.

    Args:
        shards: parts that the experts are split into.
    """
    tables = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, ExpertTable)
    }
    if not tables or recipe.model.moe is None:
        return None
    neighbours, replicas = _groups(topology, shards)
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.share_experts(neighbours, topology.device)
    # torch's collectives need no group for a single process.
    everyone = distributed.group.WORLD if topology.world_size > 1 else None
    config = recipe.optimizer.sparse_optimizer
    assert config is not None
    groups = TableGroups(replicas, everyone)
    kernel = recipe.model.moe.table_kernel
    return SparseOptimizer(tables, config, groups, kernel, topology.device)


class ExpertTablesStep(StepHook):
    """The tables' part of a step, and the running statistics that move in the same steps.

    Args:
        peak_learning_rate: of matrices.
        max_norm: of the whole model's gradient; 0 for no clipping.

    Attributes:
        norm: of the tables' gradient in this step, without loss scale, [] fp32.
    """

    def __init__(
        self,
        tables: SparseOptimizer,
        model: DecoderLM,
        topology: Topology,
        loss_scale: LossScale,
        peak_learning_rate: float,
        max_norm: float,
    ) -> None:
        self._tables = tables
        self._statistics = [
            module for module in model.modules() if isinstance(module, RunningStatistics)
        ]
        self._topology = topology
        self._loss_scale = loss_scale
        self._peak_learning_rate = peak_learning_rate
        self._max_norm = max_norm
        self.norm = torch.zeros(())

    def before_update(self) -> None:
        """Reduce the tables' gradients, whose norm is part of the whole model's."""
        self.norm = self._tables.reduce(self._loss_scale.value())

    def after_update(self, update: Update) -> None:
        """Update the tables, clipped by the factor that DeepSpeed has used.

        A skipped step moves nothing.
        """
        if update.applied and math.isfinite(update.grad_norm):
            factor = 1.0
            if self._max_norm > 0:
                # DeepSpeed's own formula, 1e-6 included: tables and dense weights must shrink
                # alike.
                factor = 1.0 / max(1.0, (update.grad_norm + 1e-6) / self._max_norm)
            self._tables.step(self._peak_learning_rate * update.learning_rate_factor, factor)
        else:
            # The collected gradients belong to the skipped step and must not leak into the next.
            self._tables.discard()
        for statistics in self._statistics:
            if update.applied:
                statistics.absorb(self._topology.all_reduce_sum)
            else:
                statistics.forget()


def _groups(
    topology: Topology, shards: int
) -> tuple[distributed.ProcessGroup | None, distributed.ProcessGroup | None]:
    """This rank's two groups: ranks that share one set of experts, and ranks with the same experts.

    The former are neighbours, as in DeepSpeed's expert-parallel groups. A group of one rank is
    None.
    """
    world_size = topology.world_size
    sharing = [list(range(first, first + shards)) for first in range(0, world_size, shards)]
    replicas = [list(range(first, world_size, shards)) for first in range(shards)]
    return topology.own_group(sharing), topology.own_group(replicas)
