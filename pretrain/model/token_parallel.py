"""Ranks that share sequences: every rank computes its own tokens, at any way of sharing.

Sequence parallelism is DeepSpeed Ulysses (Jacobs et al. 2023, arXiv 2309.14509): in attention, the
one part that mixes tokens, ranks exchange heads for tokens by all-to-all, and exchange them back.
Tensor parallelism is that of Megatron-LM with its sequence parallelism (Korthikanti et al. 2022,
arXiv 2205.05198): ranks gather each other's tokens before a product whose matrix is cut by columns,
and scatter the sums of a product whose matrix is cut by rows.

So for DeepSpeed all ranks are data parallel, each with tokens of its own, at every ZeRO stage: a
gradient is summed over each token once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, distributed, library
from torch.distributed.distributed_c10d import _resolve_process_group


@dataclass(frozen=True)
class Parts:
    """Ranks that have equal parts of something, in the order of the parts.

    Attributes:
        group_name: torch's name of their process group.
        part: of this rank, from 0.
        parts: the number of ranks.
    """

    group_name: str
    part: int
    parts: int

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor along ``dim``."""
        length = x.shape[dim] // self.parts
        return x.narrow(dim, self.part * length, length)


class TokenParts(Parts):
    """Ranks that share the sequences of one micro batch; part i has the i-th tokens of each."""

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks of what each has computed from its own tokens.

        The gradient passes unchanged: each rank adds the loss of the whole micro batch to its own,
        and gradients are averaged over all ranks.
        """
        return mean_of_ranks(x, self.group_name)


class SequenceParallel(Parts):
    """Ranks that compute the heads of attention in parts: sequence parallelism."""

    def gather_tokens(self, x_BNSX: Tensor) -> Tensor:
        """All heads of S tokens -> this rank's heads of all: [B, N / parts, parts * S, X]."""
        parts_PBnSX = x_BNSX.unflatten(1, (self.parts, -1)).movedim(1, 0)
        received_PBnSX = exchange_parts(parts_PBnSX, self.group_name)
        return received_PBnSX.movedim(0, 2).flatten(2, 3)

    def gather_heads(self, x_BnUX: Tensor) -> Tensor:
        """The inverse of :meth:`gather_tokens`."""
        parts_PBnSX = x_BnUX.unflatten(2, (self.parts, -1)).movedim(2, 0)
        received_PBnSX = exchange_parts(parts_PBnSX, self.group_name)
        return received_PBnSX.movedim(0, 1).flatten(1, 2)


class TensorParallel(Parts):
    """Ranks that have the columns or rows of a matrix in parts: tensor parallelism."""

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The tokens of all ranks, of tensors with this rank's along ``dim``."""
        gathered = gather_parts(x, self.group_name)
        return gathered.movedim(0, dim).flatten(dim, dim + 1)

    def scatter_sum(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens of the sum over all ranks, of tensors with the tokens of all."""
        return scatter_sums(x.unflatten(dim, (self.parts, -1)).movedim(dim, 0), self.group_name)


def process_group(name: str) -> distributed.ProcessGroup:
    """The group with torch's name; operators take names, because they take no objects."""
    # Some versions of torch have a type of their own for names.
    group: distributed.ProcessGroup = _resolve_process_group(cast(Any, name))
    return group


# Operators, so that compiled code and recomputation see an exchange as one. Not by ``custom_op``,
# whose first call imports the compiler: four seconds of each start.
library.define("pretrain::exchange_parts", "(Tensor parts_PX, str group_name) -> Tensor")
library.define("pretrain::mean_of_ranks", "(Tensor x, str group_name) -> Tensor")
library.define("pretrain::gather_parts", "(Tensor x, str group_name) -> Tensor")
library.define("pretrain::scatter_sums", "(Tensor parts_PX, str group_name) -> Tensor")


def exchange_parts(parts_PX: Tensor, group_name: str) -> Tensor:
    """All-to-all of equal parts [P, ...]: part i of the result is what rank i had for this one."""
    received_PX: Tensor = torch.ops.pretrain.exchange_parts(parts_PX, group_name)
    return received_PX


def mean_of_ranks(x: Tensor, group_name: str) -> Tensor:
    """The mean of a tensor over a group; its gradient passes unchanged."""
    mean: Tensor = torch.ops.pretrain.mean_of_ranks(x, group_name)
    return mean


def gather_parts(x: Tensor, group_name: str) -> Tensor:
    """All-gather: [...] of each rank -> [P, ...] on every rank."""
    gathered_PX: Tensor = torch.ops.pretrain.gather_parts(x, group_name)
    return gathered_PX


def scatter_sums(parts_PX: Tensor, group_name: str) -> Tensor:
    """Reduce-scatter: [P, ...] of each rank -> the sum over the ranks of this rank's part."""
    total: Tensor = torch.ops.pretrain.scatter_sums(parts_PX, group_name)
    return total


@library.impl("pretrain::exchange_parts", "CompositeExplicitAutograd")
def _exchange(parts_PX: Tensor, group_name: str) -> Tensor:
    received_PX = _same_shape(parts_PX, group_name)
    group = process_group(group_name)
    distributed.all_to_all_single(received_PX, parts_PX.contiguous(), group=group)
    return received_PX


@library.impl("pretrain::mean_of_ranks", "CompositeExplicitAutograd")
def _mean(x: Tensor, group_name: str) -> Tensor:
    group = process_group(group_name)
    mean = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(mean, group=group)
    return mean.div_(group.size())


@library.impl("pretrain::gather_parts", "CompositeExplicitAutograd")
def _gather(x: Tensor, group_name: str) -> Tensor:
    gathered_PX = _gathered_shape(x, group_name)
    # gloo joins along a dimension that is there.
    distributed.all_gather_into_tensor(
        gathered_PX.flatten(0, 1), x.contiguous(), group=process_group(group_name)
    )
    return gathered_PX


@library.impl("pretrain::scatter_sums", "CompositeExplicitAutograd")
def _scatter(parts_PX: Tensor, group_name: str) -> Tensor:
    total = _part_shape(parts_PX, group_name)
    joined = parts_PX.flatten(0, 1).contiguous()
    distributed.reduce_scatter_tensor(total, joined, group=process_group(group_name))
    return total


@library.register_fake("pretrain::exchange_parts")
@library.register_fake("pretrain::mean_of_ranks")
def _same_shape(x: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@library.register_fake("pretrain::gather_parts")
def _gathered_shape(x: Tensor, group_name: str) -> Tensor:
    return x.new_empty((process_group(group_name).size(), *x.shape))


@library.register_fake("pretrain::scatter_sums")
def _part_shape(parts_PX: Tensor, group_name: str) -> Tensor:
    return parts_PX.new_empty(parts_PX.shape[1:])


def _keep_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group_name = inputs[1]


for _name, _backward in (
    # What rank i got from here, its gradient brings back.
    ("exchange_parts", exchange_parts),
    ("mean_of_ranks", lambda gradient, group_name: gradient),
    # Each is the other's gradient.
    ("gather_parts", scatter_sums),
    ("scatter_sums", gather_parts),
):
    library.register_autograd(
        f"pretrain::{_name}",
        lambda ctx, gradient, backward=_backward: (backward(gradient, ctx.group_name), None),
        setup_context=_keep_group,
    )
