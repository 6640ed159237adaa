"""The exchange by the package deep_ep (DeepEP 2, DeepSeek), through DeepSpeed's own use of it.

Imported only if a recipe chooses it. A token travels to a rank once, grouped by expert on arrival;
weighted outputs are summed on their way back. The host waits for the device once a dispatch.
"""

from __future__ import annotations

from typing import Any

import deep_ep
import torch
from deepspeed import comm
from deepspeed.module_inject.auto_ep_comm import (
    deepep_combine,
    deepep_dispatch,
    new_exchange_scope,
    shared_exchange,
)

from pretrain.core.errors import ConfigError
from pretrain.model.moe.exchange.base import Journey, Routed

if not hasattr(deep_ep, "ElasticBuffer"):
    raise ConfigError(
        "model.moe.exchange=deepep needs version 2 of the package deep_ep, which has ElasticBuffer:"
        " install it, or use --set model.moe.exchange=all_to_all"
    )
# The layers of this process share one buffer, because its network resources are scarce.
SCOPE = new_exchange_scope()


class DeepEPJourney(Journey):
    """Rows and weights there, and weighted rows back.

    Every rank has to come with as many tokens as the others, as in training. The buffer grows with
    the largest call so far.
    """

    def __init__(self, layer: Any, routed: Routed) -> None:
        self._buffer = _buffer_for(layer, len(routed.x_TD))
        # The replay makes a recomputation repeat the order of rows that the first pass received.
        self._arrived_RD, self._weights, _ = deepep_dispatch(
            self._buffer,
            routed.x_TD,
            routed.routing.topk_ids_TK,
            routed.routing.topk_weights_TK,
            replay=layer._deepep_replay,
        )
        self._handle = self._buffer.last_handle

    def arrive(self) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows = self._handle.num_expanded_tokens
        ends_e = self._handle.psum_num_recv_tokens_per_expert
        counts_e = ends_e.diff(prepend=ends_e.new_zeros(1)).long()
        return self._arrived_RD[:num_rows], counts_e

    def back(self, rows_RD: torch.Tensor) -> torch.Tensor:
        # The package sums rows and does not multiply them by their weights.
        weights_R1 = self._weights[: len(rows_RD)].reshape(-1, 1)
        rows_RD = (rows_RD.float() * weights_R1).to(rows_RD.dtype)
        y_TD: torch.Tensor = deepep_combine(self._buffer, rows_RD, self._handle)
        return y_TD


def _buffer_for(layer: Any, num_tokens: int) -> Any:
    """The shared buffer, with room for as many tokens of each rank."""
    buffer = layer._deepep_exchange
    if buffer is None or buffer.num_max_tokens_per_rank < num_tokens:
        if buffer is not None:
            buffer.release()
        elif torch.cuda.is_available():
            # The group's communicator has to exist; nothing else may have used it yet.
            comm.barrier(group=layer.ep_group, device_ids=[torch.cuda.current_device()])
        # DeepSpeed's engine frees the buffers that it finds in this attribute of a layer.
        layer._deepep_exchange = buffer = shared_exchange(
            scope=SCOPE,
            ep_group=layer.ep_group,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            hidden_size=layer.hidden_size,
            num_max_tokens_per_rank=num_tokens,
        )
    return buffer
