"""Where the matrices of a model are in the flat partitions that DeepSpeed's ZeRO optimizers train.

Fact: at stages 1 to 3 the optimizer is given flat pieces of joined parameters, without their shapes
    or places.
Versions: 0.19.8
Upstream: none known
Effect: Muon, whose rule is one for whole matrices, would not know them.
Test: tests/integration/distributed/test_same_numbers_everywhere.py fails without it; none shows
    that DeepSpeed has changed
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from pretrain.optim.matrix_shards import (
    MatrixOptimizer,
    MatrixShards,
    ShardedMatrix,
    cut_matrices,
)


def give_shards(
    optimizer: Any, muon: MatrixOptimizer, zero_stage: int, device: torch.device
) -> None:
    """Set where the matrices of each partition are; at stage 0 Muon has them whole.

    Every rank must call it.
    """
    if zero_stage in (1, 2):
        _from_flat_groups(optimizer, muon, device)
    elif zero_stage == 3:
        _from_partitioned_parameters(optimizer, muon, device)


def _from_flat_groups(optimizer: Any, muon: MatrixOptimizer, device: torch.device) -> None:
    """Stages 1 and 2 join a group's parameters and cut the whole into equal partitions."""
    for index, flat_N in enumerate(optimizer.single_partition_of_fp32_groups):
        if optimizer.optimizer.param_groups[index].get("rule") != muon.matrix_rule:
            continue
        group = optimizer.real_dp_process_group[index]
        ranks = distributed.get_world_size(group)
        rank = distributed.get_rank(group)
        matrices: list[ShardedMatrix] = []
        # Offsets are those of the joined parameters, in the order in which ZeRO interleaved them.
        for parameter, start in zip(
            optimizer.round_robin_bit16_groups[index],
            optimizer.round_robin_bit16_offsets[index],
            strict=True,
        ):
            matrices += cut_matrices(
                parameter.shape,
                start=start,
                partition_size=int(optimizer.partition_size[index]),
                ranks=ranks,
                rank=rank,
                offset=0,
            )
        muon.shards[flat_N] = MatrixShards(matrices, group if ranks > 1 else None, device)


def _from_partitioned_parameters(
    optimizer: Any, muon: MatrixOptimizer, device: torch.device
) -> None:
    """Stage 3 cuts each parameter into equal parts; a sub-group joins a rank's parts."""
    groups = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
    for index, (flat_N, parameters) in enumerate(groups):
        options = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[index]]
        if options.get("rule") != muon.matrix_rule:
            continue
        matrices: list[ShardedMatrix] = []
        # This rank's parts of the sub-group's parameters follow each other in its flat tensor.
        offset = 0
        group = parameters[0].ds_process_group
        ranks = distributed.get_world_size(group)
        rank = distributed.get_rank(group)
        for parameter in parameters:
            matrices += cut_matrices(
                parameter.ds_shape,
                start=0,
                partition_size=parameter.partition_numel(),
                ranks=ranks,
                rank=rank,
                offset=offset,
            )
            offset += parameter.partition_numel()
        muon.shards[flat_N] = MatrixShards(matrices, group if ranks > 1 else None, device)
