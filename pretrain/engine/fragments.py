"""Which part of each parameter this rank's optimizer trains, wherever DeepSpeed keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import distributed, nn

from pretrain.engine.workarounds.stage0_master_weights import stage0_masters


class Fragment(NamedTuple):
    """A flat range of one parameter in this rank's optimizer.

    Attributes:
        start: its first element in the parameter, in row-major order.
        master: [N] fp32, a view of the weights that the optimizer updates.
        trained: the tensor that the optimizer knows: ``master`` is a part of it.
        offset: of ``master`` in ``trained``.
    """

    parameter: nn.Parameter
    start: int
    master: torch.Tensor
    trained: torch.Tensor
    offset: int


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, which ZeRO 3 takes away from it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def fragments(optimizer: Any, zero_stage: int, precision: str) -> list[Fragment]:
    """All that this rank trains, in the optimizer's order.

    At ZeRO 0 that is every parameter, whole; at stages 1 to 3 no element is in the optimizers of
    two ranks that hold the same parameters.

    Args:
        optimizer: the one that ``deepspeed.initialize`` returned.
    """
    if zero_stage == 0:
        return list(_whole_parameters(optimizer, precision))
    return list(_of_flat_groups(optimizer) if zero_stage < 3 else _of_sub_groups(optimizer))


def _whole_parameters(optimizer: Any, precision: str) -> Iterator[Fragment]:
    masters = stage0_masters(optimizer, precision)
    groups = optimizer.param_groups if precision == "fp32" else optimizer.fp16_groups
    for group in groups:
        for parameter in group["params"] if isinstance(group, dict) else group:
            master = masters.get(id(parameter), parameter)
            yield Fragment(parameter, 0, master.detach().view(-1), master, 0)


def _of_flat_groups(optimizer: Any) -> Iterator[Fragment]:
    """Stages 1 and 2 join a group's parameters and cut the whole into equal partitions."""
    for index, flat_N in enumerate(optimizer.single_partition_of_fp32_groups):
        size = int(optimizer.partition_size[index])
        first = size * distributed.get_rank(optimizer.real_dp_process_group[index])
        for parameter, start in zip(
            optimizer.round_robin_bit16_groups[index],
            optimizer.round_robin_bit16_offsets[index],
            strict=True,
        ):
            begin = max(start, first)
            end = min(start + parameter.numel(), first + size)
            if begin < end:
                master = flat_N.detach()[begin - first : end - first]
                yield Fragment(parameter, begin - start, master, flat_N, begin - first)


def _of_sub_groups(optimizer: Any) -> Iterator[Fragment]:
    """Stage 3 cuts each parameter into equal parts; a sub-group joins a rank's parts."""
    for flat_N, parameters in zip(
        optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True
    ):
        offset = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            start = size * distributed.get_rank(parameter.ds_process_group)
            # The last rank's part is filled up with elements that belong to no parameter.
            held = min(size, parameter.ds_numel - start)
            if held > 0:
                master = flat_N.detach()[offset : offset + held]
                yield Fragment(parameter, start, master, flat_N, offset)
            offset += size


@torch.no_grad()
def use_masters(optimizer: Any, zero_stage: int, precision: str) -> None:
    """Make the model compute with master weights that have changed. Every rank must call it."""
    if zero_stage == 0:
        masters = stage0_masters(optimizer, precision)
        for group in optimizer.fp16_groups if masters else ():
            for parameter in group:
                parameter.copy_(masters[id(parameter)])
    elif zero_stage < 3:
        optimizer.update_lp_params()
    else:
        # Small parameters are kept whole on every rank: they are cut first, and gathered again.
        optimizer.checkpoint_event_prologue()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()
