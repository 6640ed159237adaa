"""Sequence parallelism: several ranks share each sequence, and every rank computes its own tokens.

Attention is the one part that mixes tokens. There the ranks exchange heads for tokens by
all-to-all, as in DeepSpeed Ulysses (Jacobs et al. 2023, arXiv 2309.14509): each computes a share of
the heads over the whole sequence, and gets its own tokens of all heads back. Everything else sees
the tokens of its rank alone. For DeepSpeed all ranks are data parallel, at every ZeRO stage: a
gradient is summed over each token once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, library
from torch.distributed.distributed_c10d import _resolve_process_group

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import GroupName


@dataclass(frozen=True)
class SequenceParallel:
    """The ranks that share the sequences of one micro batch; part i has the i-th tokens of each.

    Attributes:
        group_name: torch's name of their group, in which they are in the order of their parts.
        part: of this rank, from 0.
        parts: the number of ranks.
    """

    group_name: str
    part: int
    parts: int

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor along ``dim``: the tokens of a sequence, or heads."""
        length = x.shape[dim] // self.parts
        return x.narrow(dim, self.part * length, length)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks of what each has computed from its own tokens.

        The gradient passes unchanged: each rank adds the loss of the whole micro batch to its own,
        and gradients are averaged over all ranks.
        """
        return mean_of_ranks(x, self.group_name)

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


# Operators, so that compiled code and recomputation see the exchange as one. Not by ``custom_op``,
# whose first call imports the compiler: four seconds of each start.
library.define("pretrain::exchange_parts", "(Tensor parts_PX, str group_name) -> Tensor")
library.define("pretrain::mean_of_ranks", "(Tensor x, str group_name) -> Tensor")


def exchange_parts(parts_PX: Tensor, group_name: str) -> Tensor:
    """All-to-all of equal parts [P, ...]: part i of the result is what rank i had for this one."""
    received_PX: Tensor = torch.ops.pretrain.exchange_parts(parts_PX, group_name)
    return received_PX


def mean_of_ranks(x: Tensor, group_name: str) -> Tensor:
    """The mean of a tensor over a group; its gradient passes unchanged."""
    mean: Tensor = torch.ops.pretrain.mean_of_ranks(x, group_name)
    return mean


@library.impl("pretrain::exchange_parts", "CompositeExplicitAutograd")
def _exchange(parts_PX: Tensor, group_name: GroupName) -> Tensor:
    received_PX = torch.empty_like(parts_PX, memory_format=torch.contiguous_format)
    distributed.all_to_all_single(
        received_PX, parts_PX.contiguous(), group=_resolve_process_group(group_name)
    )
    return received_PX


@library.impl("pretrain::mean_of_ranks", "CompositeExplicitAutograd")
def _mean(x: Tensor, group_name: GroupName) -> Tensor:
    group = _resolve_process_group(group_name)
    mean = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(mean, group=group)
    return mean.div_(group.size())


@library.register_fake("pretrain::exchange_parts")
@library.register_fake("pretrain::mean_of_ranks")
def _same_shape(x: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group_name = inputs[1]


library.register_autograd(
    "pretrain::exchange_parts",
    # What rank i got from here, its gradient brings back.
    lambda ctx, gradient_PX: (exchange_parts(gradient_PX, ctx.group_name), None),
    setup_context=_keep_group,
)
library.register_autograd(
    "pretrain::mean_of_ranks",
    lambda ctx, gradient: (gradient, None),
    setup_context=_keep_group,
)
