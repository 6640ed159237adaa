"""The groups that DeepSpeed reduces the gradients of shared tensors over."""

from __future__ import annotations

from deepspeed.utils import groups
from torch import nn


class ShardGroups(nn.Module):
    """Makes DeepSpeed's engine create the groups of tensor parallelism.

    To DeepSpeed shards are experts (:mod:`pretrain.model.tensor_shards`), of a set that
    ``tp_size`` neighbouring ranks share: its groups for that ``ep_size`` are the right ones.
    """

    def __init__(self, tp_size: int) -> None:
        super().__init__()
        self._size = tp_size

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed's engine for each module that has it."""
        groups._create_expert_and_data_parallel(
            self._size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
        )
