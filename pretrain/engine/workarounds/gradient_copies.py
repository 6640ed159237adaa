"""Copies of gradients that no update needs.

Fact: at stages 1 and 2 DeepSpeed reads all gradients for values that are not finite before it reads
    them for the norm, which shows the same; joins those of a group in the model's format before it
    casts them to fp32; copies them to fp64 for the norm on a CPU; and, if there is only one rank,
    copies each one into a bucket, divides it by 1 and copies it out again.
Versions: 0.19.8
Upstream: none known
Effect: a step on one rank would move about 98 bytes a parameter where 52 do, which is a tenth of
    the time of a small model.
Test: tests/integration/engine/test_deepspeed_facts.py::test_one_rank_copies_each_gradient
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup
from torch import distributed

# Elements whose fp64 copy stays in a core's cache: a quarter of a MB.
IN_CACHE = 1 << 15


def spare_gradient_copies(optimizer: Any, zero_stage: int) -> None:
    """Let the optimizer that ``deepspeed.initialize`` returned do each pass once.

    Gradients and updates stay what they are, to the last bit; the norm before it is rounded to
    fp32.
    """
    # Sums in another format than the model's are made while gradients are reduced.
    if zero_stage not in (1, 2) or optimizer.cpu_offload or optimizer.use_separate_grad_accum:
        return
    # DeepSpeed sees a norm that is not finite as an overflow too, on all ranks alike.
    optimizer.check_overflow = lambda partition_gradients=True: None
    if distributed.get_world_size(optimizer.dp_process_group) == 1:
        # Gradients stay where the backward pass wrote them.
        optimizer.reduce_ready_partitions_and_remove_grads = lambda parameter, group: None
    norm_of = optimizer.get_grad_norm_direct
    list_partition = optimizer.get_flat_partition

    def fp32_partition(*arguments: Any, **options: Any) -> GradPartitionBufferGroup:
        return _joined_in_fp32(list_partition(*arguments, **options))

    def norm(gradients: Iterable[torch.Tensor], *arguments: Any, **options: Any) -> torch.Tensor:
        # The norm of norms is that of their tensors.
        norms = [gradient if gradient.is_cuda else _norm(gradient) for gradient in gradients]
        total: torch.Tensor = norm_of(norms, *arguments, **options)
        return total

    optimizer.get_flat_partition = fp32_partition
    optimizer.get_grad_norm_direct = norm


def _joined_in_fp32(gradients: list[torch.Tensor]) -> GradPartitionBufferGroup:
    """One fp32 tensor of a group's gradients, which DeepSpeed updates with as it is.

    Args:
        gradients: this rank's part of each in the order of the partition, with its padding.
    """
    flat_N = torch.empty(
        sum(gradient.numel() for gradient in gradients), device=gradients[0].device
    )
    joined: list[torch.Tensor] = []
    for gradient, part in zip(
        gradients, flat_N.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        part = part.view_as(gradient)
        part.copy_(gradient)
        # DeepSpeed's mark of what is no parameter's gradient.
        if getattr(gradient, "_zero_padding", False):
            part._zero_padding = True
        joined.append(part)
    return GradPartitionBufferGroup(joined, flat_N)


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    """The L2 norm as DeepSpeed computes it on a CPU, fp64, without a copy of the whole gradient."""
    parts = gradient.view(-1).split(IN_CACHE)
    norm = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(part.double()) for part in parts])
    )
    if getattr(gradient, "_zero_padding", False):
        norm._zero_padding = True
    return norm
