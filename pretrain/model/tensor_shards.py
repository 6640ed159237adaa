"""Cuts the parameters of a model that ranks share by tensor parallelism.

Parameters are cut before they have values: initial weights are those of the whole tensors, of which
each rank keeps its columns or rows. To DeepSpeed a shard is an expert: its gradient is that of
all tokens of the ranks that share the tensor, and is summed over the ranks with the same shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.model.token_parallel import TensorParallel


class Shard(NamedTuple):
    """Which part of the whole tensor a parameter is: ``part`` of ``parts`` along ``dim``."""

    dim: int
    part: int
    parts: int


# Returns the elements ``start`` to ``stop`` (excluded) of a tensor, flat.
RangeReader = Callable[[int, int], Tensor]


def whole_shape(shape: torch.Size, shard: Shard) -> torch.Size:
    """The shape of the tensor of which a parameter of this shape is a part."""
    sizes = list(shape)
    sizes[shard.dim] *= shard.parts
    return torch.Size(sizes)


def part_of(read: RangeReader, shape: torch.Size, shard: Shard) -> RangeReader:
    """A reader of a part with this shape, from one of the whole tensor."""
    if shard.dim == 0:
        before = shard.part * shape.numel()
        return lambda start, stop: read(before + start, before + stop)
    number, width = shape[-1], shape[-1] * shard.parts
    first = shard.part * number

    def columns(start: int, stop: int) -> Tensor:
        first_row, last_row = start // number, -(-stop // number)
        rows = read(first_row * width, last_row * width).view(-1, width)
        found = rows[:, first : first + number].reshape(-1)
        return found[start - first_row * number : stop - first_row * number]

    return columns


def shard_of(parameter: nn.Parameter) -> Shard | None:
    """How a parameter was cut; None for one that is whole."""
    shard: Shard | None = getattr(parameter, "tensor_shard", None)
    return shard


def cut(module: nn.Module, name: str, dim: int, tensor: TensorParallel) -> None:
    """Keep this rank's part along ``dim`` of a module's parameter."""
    whole = getattr(module, name)
    parameter = nn.Parameter(tensor.own(whole.detach(), dim).clone())
    # Marks such as muP's factor of the learning rate.
    parameter.__dict__.update(whole.__dict__)
    group_name = f"ep_size_{tensor.parts}"
    marks = {
        "tensor_shard": Shard(dim, tensor.part, tensor.parts),
        # What DeepSpeed's layers write on an expert, for ZeRO 0 to 2 and for ZeRO 3.
        "allreduce": False,
        "group_name": group_name,
        "ds_zero_placement_family": "autoep_expert",
        "ds_zero_partition_group_name": group_name,
    }
    parameter.__dict__.update(marks)
    setattr(module, name, parameter)


def cut_columns(tensor: TensorParallel, *linears: nn.Linear | None) -> None:
    """Keep a part of the outputs of products."""
    for linear in linears:
        if linear is not None:
            cut(linear, "weight", 0, tensor)
            if linear.bias is not None:
                cut(linear, "bias", 0, tensor)


def cut_rows(tensor: TensorParallel, linear: nn.Linear) -> None:
    """Keep a part of the inputs of a product, whose outputs are then to be summed over the ranks.

    The bias is added by the first rank alone.
    """
    cut(linear, "weight", 1, tensor)
    if linear.bias is not None:
        linear.__class__ = _BiasOfFirst
        linear.bias_share = 1.0 if tensor.part == 0 else 0.0  # type: ignore[assignment]


class _BiasOfFirst(nn.Linear):
    """A product whose bias counts on one of the ranks that sum it; others have a gradient of 0."""

    bias_share: float

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return functional.linear(x, self.weight, self.bias * self.bias_share)


def own_rows(linear: nn.Linear, x: Tensor, rows: slice) -> Tensor:
    """Some of the outputs of a product that is whole on every rank."""
    bias = None if linear.bias is None else linear.bias[rows]
    return functional.linear(x, linear.weight[rows], bias)


def embed_shard(weight_vE: Tensor, ids: Tensor, tensor: TensorParallel) -> Tensor:
    """Rows of an embedding for this rank's tokens, from ranks that have a part of its rows each.

    Args:
        weight_vE: this rank's rows.
        ids: [B, S] of this rank's tokens, of the whole vocabulary.
    """
    local = tensor.gather(ids, dim=1) - tensor.part * len(weight_vE)
    is_here = (local >= 0) & (local < len(weight_vE))
    x = functional.embedding(local.where(is_here, torch.zeros_like(local)), weight_vE)
    return tensor.scatter_sum(x * is_here[..., None], dim=1)
