"""PEER (He 2024, "Mixture of a Million Experts"): each token reads a few tiny experts from tables.

With experts spread over ranks, nearly every token needs experts of every rank. So the tokens travel
to all ranks of the group, each rank computes its own experts' share of every output, and the shares
are summed on the token's rank: 2 D elements per token and rank, while sending a row for each choice
would move 2 heads K D.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import distributed, nn
from torch.nn import functional

from pretrain.model.config import ModelConfig
from pretrain.model.moe.base import MoELayer, RoutingRecord, Stream
from pretrain.model.moe.config import PEERConfig
from pretrain.model.moe.product_keys import ProductKeys, Retrieval
from pretrain.model.moe.shared_experts import shared_experts
from pretrain.model.moe.tables.interface import Bags
from pretrain.model.moe.tables.products import ExpertTable, kernel_named

# Values of a table that one random stream fills: seeding one per expert is slow for a million.
VALUES_A_STREAM = 1 << 20
# Each table -> the feed-forward matrix that its rows are parts of, whose initial size they have.
TABLE_SUFFIXES = {
    "up.weight": ".up_proj.weight",
    "gate.weight": ".gate_proj.weight",
    "down.weight": ".down_proj.weight",
}


class PEERExperts(nn.Module):
    """This rank's experts: ``up`` (and ``gate`` if gated) [e, X, D], and ``down`` [e, F, D].

    Expert e returns for x the sum over f of activate(gate_e x, up_e x)_f down_ef: rows of ``down``
    become the output. Parameters are in :class:`ExpertTable`.
    """

    def __init__(self, model: ModelConfig, config: PEERConfig, num_local: int) -> None:
        super().__init__()
        self.form = model.feed_forward
        self.kind = model.feed_forward.implementing_class()
        rows = config.moe_intermediate_size * self.form.expansion
        self.up = ExpertTable(num_local, rows, model.hidden_size)
        self.gate = ExpertTable(num_local, rows, model.hidden_size) if self.form.gated else None
        self.down = ExpertTable(num_local, config.moe_intermediate_size, model.hidden_size)
        self.dropout = model.dropout.feed_forward
        self.kernel_name = config.expert_kernel

    def forward(self, x_TD: torch.Tensor, bags: Bags, weights_P: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's expert outputs, [T, D] fp32.

        Args:
            x_TD: fp32 tokens.
            bags: the local experts of each token.
            weights_P: the weight of each pair of a token and an expert.
        """
        kernel = kernel_named(self.kernel_name, x_TD.device)
        up_PX = self.up.dots(x_TD, bags, kernel)
        # Kinds without a gate take one product in two parts: the whole, and an empty tensor.
        first_PX, second_PX = (
            (self.gate.dots(x_TD, bags, kernel), up_PX)
            if self.gate is not None
            else (up_PX, up_PX[:, :0])
        )
        hidden_PF = functional.dropout(
            self.kind.activate(self.form, first_PX, second_PX), self.dropout, self.training
        )
        # The router's weight enters as a factor of the hidden units: no output per expert is
        # formed.
        return self.down.weighted(hidden_PF * weights_P[:, None], bags, kernel)


class PEER(MoELayer, nn.Module):
    """The layer: retrieval and experts, with shared experts in parallel.

    Same interface as ``DroplessMoE``, without router statistics. ``usage_E`` counts how often this
    rank's tokens chose each expert in training, until its reader resets it to zero.

    Args:
        ep_size: ranks that share the experts; ``ep_rank`` holds experts [ep_rank * e, (ep_rank + 1)
            * e).
    """

    usage_E: torch.Tensor

    def __init__(self, model: ModelConfig, ep_size: int = 1, ep_rank: int = 0) -> None:
        super().__init__()
        config = cast(PEERConfig, model.moe)
        self.num_experts = config.total_experts
        self.ep_size = ep_size
        self.ep_rank = ep_rank
        self.num_local_experts = self.num_experts // ep_size
        self.retrieval = ProductKeys(config, model.hidden_size, model.norm.eps)
        self.experts = PEERExperts(model, config, self.num_local_experts)
        self.shared = shared_experts(model)
        self.register_buffer(
            "usage_E", torch.zeros(self.num_experts, dtype=torch.int64), persistent=False
        )
        self.group: distributed.ProcessGroup | None = None

    @property
    def counted_choices_E(self) -> torch.Tensor | None:
        return self.usage_E

    def share_experts(self, group: distributed.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        self.usage_E = self.usage_E.to(device)

    def expert_streams(self, name: str) -> Iterator[tuple[nn.Parameter, list[Stream]]]:
        """Each block of about a million values of a table has its own random stream.

        A block is drawn whole even if this rank holds a part of it, so that values do not depend on
        ep_size.
        """
        first = self.ep_rank * self.num_local_experts
        last = first + self.num_local_experts
        for table_name, table in self.experts.named_parameters():
            size = table[0].numel()
            block = max(1, VALUES_A_STREAM // size)
            stem = table_name.removesuffix(".weight")
            streams = []
            for start in range(first // block * block, last, block):
                stop = min(start + block, self.num_experts)
                low, high = max(start, first), min(stop, last)
                streams.append(
                    Stream(
                        name=f"{name}.{stem}.{start}{TABLE_SUFFIXES[table_name]}",
                        shape=(stop - start, *table.shape[1:]),
                        start=(low - first) * size,
                        first=(low - start) * size,
                        last=(high - start) * size,
                    )
                )
            yield table, streams

    def forward(
        self, x_BSD: torch.Tensor, record: RoutingRecord | None = None, fractions_E: None = None
    ) -> tuple[torch.Tensor, None]:
        """[B, S, D] -> [B, S, D] and no statistics: the scores of all experts are never formed.

        Args:
            record: the choice to write or, if it is filled, to repeat (activation checkpointing).
        """
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        # The recomputation of a checkpointed block must not count its choices a second time.
        repeated = record is not None and record.topk_ids_TK is not None
        retrieval = self.retrieval(x_TD, record)
        if self.training and not repeated:
            chosen = retrieval.ids_ThK.reshape(-1)
            self.usage_E.index_add_(0, chosen, torch.ones_like(chosen))
        y_TD = (
            self._local(x_TD.float(), retrieval)
            if self.ep_size == 1
            else self._exchanged(x_TD.float(), retrieval, record or RoutingRecord())
        )
        y_TD = y_TD.to(x_BSD.dtype)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(x_BSD), None

    def _local(self, x_TD: torch.Tensor, retrieval: Retrieval) -> torch.Tensor:
        """All experts are on this rank: [T, D] fp32 -> [T, D]."""
        ids_TR = retrieval.ids_ThK.flatten(1)
        offsets_T1 = torch.arange(0, ids_TR.numel() + 1, ids_TR.shape[1], device=ids_TR.device)
        return self.experts(
            x_TD, Bags(ids_TR.reshape(-1), offsets_T1), retrieval.weights_ThK.reshape(-1)
        )

    def _exchanged(
        self, x_TD: torch.Tensor, retrieval: Retrieval, record: RoutingRecord
    ) -> torch.Tensor:
        """The tokens of all ranks of the group through this rank's experts, and the shares back.

        G is the number of tokens of the whole group.
        """
        ids_TR, weights_TR = retrieval.ids_ThK.flatten(1), retrieval.weights_ThK.flatten(1)
        group = self.group
        ids_GR = record.exchanged("ids", lambda: _gather(ids_TR, group))
        x_GD = record.exchanged("tokens", lambda: _Gather.apply(x_TD, group))
        weights_GR = record.exchanged("weights", lambda: _Gather.apply(weights_TR, group))
        # Global to local ids; those outside of [0, e) belong to other ranks, which compute their
        # share.
        local_GR = ids_GR - self.ep_rank * self.num_local_experts
        is_mine_GR = (local_GR >= 0) & (local_GR < self.num_local_experts)
        offsets_G1 = functional.pad(is_mine_GR.sum(dim=1).cumsum(0), (1, 0))
        share_GD = self.experts(
            x_GD, Bags(local_GR[is_mine_GR], offsets_G1), weights_GR[is_mine_GR]
        )
        return record.exchanged("outputs", lambda: _SumAndScatter.apply(share_GD, group))


def _gather(local: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """The rows of all ranks of the group, in rank order."""
    everything = local.new_empty(
        local.shape[0] * distributed.get_world_size(group), *local.shape[1:]
    )
    # The collective reads memory as it is: a strided view would send the wrong elements.
    distributed.all_gather_into_tensor(everything, local.contiguous(), group=group)
    return everything


def _sum_and_scatter(
    everything: torch.Tensor, group: distributed.ProcessGroup | None
) -> torch.Tensor:
    """This rank's part of the rows, summed over all ranks."""
    mine = everything.new_empty(
        everything.shape[0] // distributed.get_world_size(group), *everything.shape[1:]
    )
    distributed.reduce_scatter_tensor(mine, everything.contiguous(), group=group)
    return mine


class _Gather(torch.autograd.Function):
    """The rows of all ranks.

    Each rank computes with every rank's rows, so a row's gradient is the sum over all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, local: torch.Tensor, group: distributed.ProcessGroup | None
    ) -> torch.Tensor:
        ctx.group = group
        return _gather(local, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum_and_scatter(gradient, ctx.group), None


class _SumAndScatter(torch.autograd.Function):
    """The transpose of :class:`_Gather`."""

    @staticmethod
    def forward(
        ctx: Any, everything: torch.Tensor, group: distributed.ProcessGroup | None
    ) -> torch.Tensor:
        ctx.group = group
        return _sum_and_scatter(everything, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # The output was a sum over ranks, so every rank's share gets the same gradient.
        return _gather(gradient, ctx.group), None
