"""The exchange by torch's all-to-all in which a token travels to a rank once.

As DeepEP does (DeepSeek-V3, section 3.2): however many of a rank's experts a token has chosen, its
row is sent there once, with the list of its experts there and their weights. That rank sums their
weighted outputs, and one row comes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from pretrain.model.moe.dispatch import Spread, group_rows, permute_rows, spread_rows, sum_rows
from pretrain.model.moe.exchange.base import Journey, Routed
from pretrain.model.moe.exchange.transfer import Counts, Transfer


@dataclass
class _Choices:
    """The C = T * K choices of this rank's tokens, sorted by rank and then by token.

    Attributes:
        order_C: the flattened choice at each place; ``inverse_C`` is the inverse.
        packet_C: which row that is sent each choice belongs to.
        codes_C1: 2 * local expert, plus 1 for a row's first choice, int32.
        counts: rows and choices sent to each rank, [P, 2].
        arrived_C1: the codes that came here, once they have.
    """

    order_C: torch.Tensor
    inverse_C: torch.Tensor
    packet_C: torch.Tensor
    codes_C1: torch.Tensor
    counts: Counts
    arrived_C1: torch.Tensor | None = None


class DeduplicatedJourney(Journey):
    """Rows go to a rank once and come back summed; codes and weights of choices go with them."""

    def __init__(self, layer: Any, routed: Routed) -> None:
        record, weights_TK = routed.record, routed.routing.topk_weights_TK
        choices: _Choices | None = None if record is None else record.plan
        if choices is None:
            choices = _choices_of(layer, routed.routing.topk_ids_TK)
        weights_C1 = permute_rows(weights_TK.reshape(-1, 1), choices.order_C, choices.inverse_C)
        # [direction, rank, (rows, choices)]
        (rows_sent, sent), (rows_received, received) = (
            zip(*side, strict=True) for side in choices.counts.numbers()
        )
        if record is not None:
            record.plan = choices
        self._choices, self._num_local_experts = choices, layer.num_local_experts
        self._here = _spread_of(choices, sum(rows_sent), *weights_TK.shape)
        # What a recomputation has kept need not travel again.
        self._codes = None
        if choices.arrived_C1 is None:
            self._codes = Transfer(sent, received, layer.ep_group).start(choices.codes_C1)
        group = layer.ep_group
        self._weights = Transfer(sent, received, group, record, "weights").start(weights_C1)
        self._rows = Transfer(rows_sent, rows_received, group, record)
        self._rows.start(spread_rows(routed.x_TD, self._here))

    def arrive(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._codes is not None:
            self._choices.arrived_C1 = self._codes.finish()
        assert self._choices.arrived_C1 is not None
        codes_C = self._choices.arrived_C1[:, 0]
        packet_C = (codes_C % 2).cumsum(0) - 1
        order_C, inverse_C, counts_e = group_rows(codes_C // 2, self._num_local_experts)
        rows_RD = self._rows.finish()
        places_R = torch.arange(len(rows_RD), device=codes_C.device)
        starts_R = torch.searchsorted(packet_C, places_R)
        self._local = Spread(packet_C[order_C], inverse_C, starts_R)
        self._weights_C1 = permute_rows(self._weights.finish(), order_C, inverse_C)
        return spread_rows(rows_RD, self._local), counts_e

    def back(self, rows_RD: torch.Tensor) -> torch.Tensor:
        sums_RD = sum_rows(rows_RD, self._local, self._weights_C1)
        return sum_rows(self._rows.reversed().start(sums_RD).finish(), self._here)


def _spread_of(choices: _Choices, num_rows: int, num_tokens: int, top_k: int) -> Spread:
    """The token of each row that is sent, and each token's rows."""
    places_R = torch.arange(num_rows, device=choices.packet_C.device)
    token_R = choices.order_C[torch.searchsorted(choices.packet_C, places_R)] // top_k
    order_R, _, counts_T = group_rows(token_R, num_tokens)
    return Spread(token_R, order_R, counts_T.cumsum(0) - counts_T)


def _choices_of(layer: Any, topk_ids_TK: torch.Tensor) -> _Choices:
    ids_C = topk_ids_TK.reshape(-1)
    ranks_C = ids_C // layer.num_local_experts
    order_C, inverse_C, choices_P = group_rows(ranks_C, layer.ep_size)
    # A row begins where the rank or the token is another one than at the place before.
    key_C = (ranks_C * len(topk_ids_TK))[order_C] + order_C // topk_ids_TK.shape[1]
    first_C = key_C.diff(prepend=key_C.new_full((1,), -1)) != 0
    rows_C = first_C.cumsum(0)
    ends_P = functional.pad(rows_C, (1, 0))[choices_P.cumsum(0)]
    rows_P = ends_P.diff(prepend=ends_P.new_zeros(1))
    counts = Counts(torch.stack((rows_P, choices_P), dim=1), layer.ep_group)
    # Computed while the counts are copied to the host, as are the weights in their order.
    codes_C = (ids_C % layer.num_local_experts)[order_C] * 2 + first_C
    return _Choices(order_C, inverse_C, rows_C - 1, codes_C.int()[:, None], counts)
