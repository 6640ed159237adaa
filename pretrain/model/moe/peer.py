"""PEER (He 2024, "Mixture of a Million Experts"): each token reads a few of very many tiny experts
out of tables.

With experts spread over ranks, nearly every token needs experts of every rank. So the tokens go to
all ranks of the group, each computes its own experts' share of every answer, and the shares are
added where the token came from: that moves 2 D numbers a token and rank, where sending a row for
each choice would move 2 heads K D.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import distributed, nn
from torch.nn import functional

from pretrain.model.config import ModelConfig
from pretrain.model.moe.base import Fill, MoELayer, RoutingRecord
from pretrain.model.moe.config import PEERConfig
from pretrain.model.moe.product_keys import ProductKeys, Retrieval
from pretrain.model.moe.shared_experts import shared_experts
from pretrain.model.moe.tables.interface import Bags
from pretrain.model.moe.tables.products import ExpertTable, kernel_named

# Values of a table that one random stream fills.
VALUES_A_STREAM = 1 << 20
# The tables by the matrices of a feed-forward that their rows are parts of, and so start like.
TABLE_SUFFIXES = {
    "up.weight": ".up_proj.weight",
    "gate.weight": ".gate_proj.weight",
    "down.weight": ".down_proj.weight",
}


class PEERExperts(nn.Module):
    """This rank's experts: ``up`` (and ``gate`` for gated kinds) [e, X, D] and ``down`` [e, F, D],
    the rows that become their outputs.

    Expert e returns for x the sum over f of activate(gate_e x, up_e x)_f down_ef. Parameters are in
    :class:`ExpertTable`.
    """

    def __init__(self, model: ModelConfig, config: PEERConfig, num_local: int) -> None:
        super().__init__()
        self.form, self.kind = model.feed_forward, model.feed_forward.implementing_class()
        rows = config.moe_intermediate_size * self.form.expansion
        self.up = ExpertTable(num_local, rows, model.hidden_size)
        self.gate = ExpertTable(num_local, rows, model.hidden_size) if self.form.gated else None
        self.down = ExpertTable(num_local, config.moe_intermediate_size, model.hidden_size)
        self.dropout, self.kernel_name = model.dropout.feed_forward, config.expert_kernel

    def forward(self, x_TD: torch.Tensor, bags: Bags, weights_P: torch.Tensor) -> torch.Tensor:
        """fp32 tokens [T, D], their local experts and the weights of these -> the weighted sum of
        outputs [T, D].
        """
        kernel = kernel_named(self.kernel_name, x_TD.device)
        up_PX = self.up.dots(x_TD, bags, kernel)
        # Kinds without a gate take two halves of one product: all of it, and nothing.
        first_PX, second_PX = (
            (self.gate.dots(x_TD, bags, kernel), up_PX)
            if self.gate is not None
            else (up_PX, up_PX[:, :0])
        )
        hidden_PF = functional.dropout(
            self.kind.activate(self.form, first_PX, second_PX), self.dropout, self.training
        )
        return self.down.weighted(hidden_PF * weights_P[:, None], bags, kernel)


class PEER(MoELayer, nn.Module):
    """The layer: retrieval, experts, and shared experts beside them.

    Interface of ``DroplessMoE``, without router statistics.

    ``usage_E`` counts how often tokens of this rank chose each expert in training, until somebody
    reads it and sets it to zero.

    Args:
        ep_size: ranks that share the experts; ``ep_rank`` holds experts [ep_rank * e, (ep_rank + 1)
            * e).
    """

    usage_E: torch.Tensor

    def __init__(self, model: ModelConfig, ep_size: int = 1, ep_rank: int = 0) -> None:
        super().__init__()
        config = cast(PEERConfig, model.moe)
        self.num_experts, self.ep_size, self.ep_rank = config.total_experts, ep_size, ep_rank
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
        self.group, self.usage_E = group, self.usage_E.to(device)

    def fill_experts(self, name: str, fill: Fill) -> list[torch.Tensor]:
        """A stream for each million values or so of a table, drawn whole even if part of them is
        held.
        """
        done: list[torch.Tensor] = []
        first = self.ep_rank * self.num_local_experts
        last = first + self.num_local_experts
        for table_name, table in self.experts.named_parameters():
            block = max(1, VALUES_A_STREAM // table[0].numel())
            stem, suffix = table_name.removesuffix(".weight"), TABLE_SUFFIXES[table_name]
            for start in range(first // block * block, last, block):
                size = min(block, self.num_experts - start)
                drawn = torch.empty(size, *table.shape[1:], device=table.device)
                fill(drawn, f"{name}.{stem}.{start}{suffix}")
                low, high = max(start, first), min(start + block, last)
                table[low - first : high - first] = drawn[low - start : high - start]
            done.append(table)
        return done

    def forward(
        self, x_BSD: torch.Tensor, record: RoutingRecord | None = None, fractions_E: None = None
    ) -> tuple[torch.Tensor, None]:
        """[B, S, D] -> [B, S, D].

        No statistics, because the scores of all experts are never formed.

        Args:
            record: the choice to write or, where it is filled, to repeat (activation
                checkpointing).
        """
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        repeated = record is not None and record.topk_ids_TK is not None
        retrieval = self.retrieval(x_TD, record)
        if self.training and not repeated:
            chosen = retrieval.ids_ThK.reshape(-1)
            self.usage_E.index_add_(0, chosen, torch.ones_like(chosen))
        y_TD = (
            self._local(x_TD.float(), retrieval)
            if self.ep_size == 1
            else self._exchanged(x_TD.float(), retrieval)
        )
        y_TD = y_TD.to(x_BSD.dtype)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(x_BSD), None

    def _local(self, x_TD: torch.Tensor, retrieval: Retrieval) -> torch.Tensor:
        ids_TR = retrieval.ids_ThK.flatten(1)
        offsets_T1 = torch.arange(0, ids_TR.numel() + 1, ids_TR.shape[1], device=ids_TR.device)
        return self.experts(
            x_TD, Bags(ids_TR.reshape(-1), offsets_T1), retrieval.weights_ThK.reshape(-1)
        )

    def _exchanged(self, x_TD: torch.Tensor, retrieval: Retrieval) -> torch.Tensor:
        """The tokens of all ranks of the group through this rank's experts, and the shares of this
        rank's tokens back.
        """
        ids_GR = _gather(retrieval.ids_ThK.flatten(1), self.group)
        x_GD = _Gather.apply(x_TD, self.group)
        weights_GR = _Gather.apply(retrieval.weights_ThK.flatten(1), self.group)
        local_GR = ids_GR - self.ep_rank * self.num_local_experts
        is_mine_GR = (local_GR >= 0) & (local_GR < self.num_local_experts)
        offsets_G1 = functional.pad(is_mine_GR.sum(dim=1).cumsum(0), (1, 0))
        share_GD = self.experts(
            x_GD, Bags(local_GR[is_mine_GR], offsets_G1), weights_GR[is_mine_GR]
        )
        y_TD: torch.Tensor = _SumAndScatter.apply(share_GD, self.group)
        return y_TD


def _gather(local: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """The rows of all ranks, in their order."""
    everything = local.new_empty(
        local.shape[0] * distributed.get_world_size(group), *local.shape[1:]
    )
    distributed.all_gather_into_tensor(everything, local.contiguous(), group=group)
    return everything


def _sum_and_scatter(
    everything: torch.Tensor, group: distributed.ProcessGroup | None
) -> torch.Tensor:
    """The sum over all ranks of this rank's part of the rows."""
    mine = everything.new_empty(
        everything.shape[0] // distributed.get_world_size(group), *everything.shape[1:]
    )
    distributed.reduce_scatter_tensor(mine, everything.contiguous(), group=group)
    return mine


class _Gather(torch.autograd.Function):
    """All ranks' rows.

    Each is a function of its own rank's, so the gradient is the sum of what all ranks made of it.
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
        return _gather(gradient, ctx.group), None
