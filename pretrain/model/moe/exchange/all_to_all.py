"""The exchange by torch's all-to-all: each choice of an expert travels as a row of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from pretrain.model.moe.dispatch import combine, gather_tokens, group_arrived, permute_rows
from pretrain.model.moe.exchange.base import Journey, Routed
from pretrain.model.moe.exchange.deduplicated import DeduplicatedJourney
from pretrain.model.moe.exchange.transfer import Counts, Transfer


def journey(layer: Any, routed: Routed) -> Journey:
    """The tokens of a call on their way, each to a rank once if the layer deduplicates."""
    return (DeduplicatedJourney if layer.deduplicate else RowsJourney)(layer, routed)


class RowsJourney(Journey):
    """Rows sorted by global expert go there, and each expert's output comes back as a row."""

    def __init__(self, layer: Any, routed: Routed) -> None:
        self._routed = routed
        order_R, inverse_R, counts_E = routed.grouping
        plan = None if routed.record is None else routed.record.plan
        if plan is None:
            counts_Pe = counts_E.view(layer.ep_size, layer.num_local_experts)
            plan = Counts(counts_Pe, layer.ep_group)
        # On a GPU the rows are gathered while the counts are copied to the host.
        rows_RD = gather_tokens(
            routed.x_TD, order_R, inverse_R, routed.routing.topk_ids_TK.shape[1]
        )
        sent, received = ([sum(row) for row in side] for side in plan.numbers())
        if routed.record is not None:
            routed.record.plan = plan
        self._counts_Pe = plan.received_PN
        self._there = Transfer(sent, received, layer.ep_group, routed.record).start(rows_RD)

    def arrive(self) -> tuple[torch.Tensor, torch.Tensor]:
        grouping = group_arrived(self._counts_Pe, sum(self._there.received))
        self._order_R, self._inverse_R, counts_e = grouping
        return permute_rows(self._there.finish(), self._order_R, self._inverse_R), counts_e

    def back(self, rows_RD: torch.Tensor) -> torch.Tensor:
        rows_RD = permute_rows(rows_RD, self._inverse_R, self._order_R)
        rows_RD = self._there.reversed().start(rows_RD).finish()
        # Before the weights, so that a dropped element is one of an expert's output.
        rows_RD = functional.dropout(rows_RD, self._routed.dropout)
        order_R, inverse_R, _ = self._routed.grouping
        return combine(
            rows_RD,
            order_R=order_R,
            inverse_R=inverse_R,
            weights_TK=self._routed.routing.topk_weights_TK,
        )
