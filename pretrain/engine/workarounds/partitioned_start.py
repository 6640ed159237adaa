"""Parameters that are partitioned before DeepSpeed gets the model.

Fact: at stage 3 ``deepspeed.initialize`` partitions a model that each rank holds whole.
    ``deepspeed.zero.Init`` partitions one while it is built, but the experts of AutoEP layers over
    all ranks too, and ``deepspeed.initialize`` takes only those that are partitioned over the ranks
    that hold the same experts.
Versions: 0.19.8
Upstream: none known
Effect: a rank would need memory for the whole model when it starts. So parameters are handed over
    one by one, already partitioned, each over its own group.
Test:
    tests/integration/engine/test_deepspeed_facts.py::test_experts_that_zero_init_partitions_are_spread_over_all_ranks
"""

from __future__ import annotations

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.utils import groups
from torch import distributed, nn

from pretrain.core.files import JsonObject
from pretrain.engine.shard_groups import ShardGroups


class PartitionedStart:
    """Partitions parameters one by one, as DeepSpeed would partition those of a whole model.

    Every rank must make one, because it makes process groups.

    Args:
        model: whose modules name the groups that experts and shards are partitioned over.
        ds_config: resolved, without monitors.
        dtype: of the parameters.
    """

    def __init__(self, model: nn.Module, ds_config: JsonObject, dtype: torch.dtype) -> None:
        for layer in model.modules():
            if isinstance(layer, AutoEPMoELayer | ShardGroups):
                # Groups have to exist before the first expert is partitioned. DeepSpeed does this
                # again, and finds them.
                layer.set_deepspeed_parallelism()
        # A module without parameters: those of the model follow one by one.
        self._init = Init(module=nn.Module(), config_dict_or_path=ds_config, dtype=dtype)

    def own_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """The first element of this rank's part of a whole parameter, and the one after its last.

        Parts are equal, so that those of the last ranks may be shorter or empty.
        """
        # zero_hpz_partition_size: a rank keeps a second, larger part of each parameter.
        if self._init.zero_param_process_group is not None:
            return 0, parameter.numel()
        group = self._group(parameter)
        size = -(-parameter.numel() // distributed.get_world_size(group))
        first = min(size * distributed.get_rank(group), parameter.numel())
        return first, min(first + size, parameter.numel())

    def keep_own_part(self, parameter: nn.Parameter) -> None:
        """Make the part that :meth:`own_range` names all that this rank holds of a parameter."""
        if hasattr(parameter, "ds_zero_partition_group_name"):
            group = self._group(parameter)
            parameter.ds_zero_partition_process_group = group  # type: ignore[attr-defined]
        self._init._convert_to_deepspeed_param(parameter)
        # DeepSpeed would broadcast the parameter first: here all ranks compute the same values.
        parameter.partition()  # type: ignore[attr-defined]

    def _group(self, parameter: nn.Parameter) -> distributed.ProcessGroup:
        name = getattr(parameter, "ds_zero_partition_group_name", None)
        if name is None:
            group: distributed.ProcessGroup = self._init.ds_process_group
        else:
            group = groups._get_expert_data_parallel_group(name)
        return group
