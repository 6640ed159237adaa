"""Tables of many small experts beside DeepSpeed's engine, which would give them dense gradients and, in its checkpoints, a file an expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import distributed

from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import expert_shards
from pretrain.engine.sparse_optimizer import RowGroups, SparseOptimizer
from pretrain.engine.topology import Topology
from pretrain.model.decoder import DecoderLM
from pretrain.model.moe.base import MoELayer
from pretrain.model.moe.tables.products import ExpertTable


def expert_rows(
    model: DecoderLM, recipe: Recipe, zero_stage: int, topology: Topology
) -> SparseOptimizer | None:
    """Takes the tables of a PEER model out of its parameters, before DeepSpeed sees them; None for other models. All ranks must call it."""
    tables = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, ExpertTable)
    }
    if not tables or recipe.model.moe is None:
        return None
    shards = expert_shards(recipe, topology.world_size, zero_stage)
    sharing, replicas = _groups(topology, shards)
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.share_experts(sharing, topology.device)
    everyone = distributed.group.WORLD if topology.world_size > 1 else None
    config = recipe.optimizer.row_optimizer
    assert config is not None
    return SparseOptimizer(
        tables,
        config,
        RowGroups(replicas, everyone),
        recipe.model.moe.table_kernel,
        topology.device,
    )


def _groups(
    topology: Topology, shards: int
) -> tuple[distributed.ProcessGroup | None, distributed.ProcessGroup | None]:
    """This rank's group of ranks that share one set of experts, neighbours as DeepSpeed has them, and that of ranks with the same experts."""
    world_size, mine = topology.world_size, []
    for size, ranks_of in (
        (shards, [list(range(first, first + shards)) for first in range(0, world_size, shards)]),
        (world_size // shards, [list(range(first, world_size, shards)) for first in range(shards)]),
    ):
        groups = [distributed.new_group(ranks) for ranks in ranks_of] if size > 1 else []
        mine.append(
            next(
                (
                    group
                    for group, ranks in zip(groups, ranks_of, strict=False)
                    if topology.rank in ranks
                ),
                None,
            )
        )
    return mine[0], mine[1]


def count_in_norm(optimizer: Any, zero_stage: int, rows_norm: Callable[[], torch.Tensor]) -> None:
    """Makes the norm that DeepSpeed's ZeRO stages clip by, report and look at for overflow that of the whole model, its tables included.

    Args:
        rows_norm: the tables' norm of this step, without loss scale.
    """

    def scaled() -> torch.Tensor:
        return rows_norm() * optimizer.loss_scale

    if zero_stage in (1, 2):
        norm_of_dense = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda norm_type=2: combine_grad_norm_groups(
            [norm_of_dense(norm_type), scaled()]
        )
    elif zero_stage == 3:
        groups_of_dense = optimizer._get_norm_groups
        optimizer._get_norm_groups = lambda: [*groups_of_dense(), scaled()]
