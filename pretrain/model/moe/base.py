"""What every kind of MoE layer takes and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class RouterStatistics(NamedTuple):
    """What one MoE layer says about its routing of one micro batch; all fp32, on the device, no host synchronisation.

    Attributes:
        losses_J: [J] the losses of ``balance.LOSSES`` in that order, unweighted, differentiable.
        counts_E: [E] tokens that chose each expert, over all top_k choices, before any drop.
        entropy: [] mean entropy of a token's probabilities, nats.
        dropped: [] share of the choices that found no room.
    """

    losses_J: torch.Tensor
    counts_E: torch.Tensor
    entropy: torch.Tensor
    dropped: torch.Tensor


@dataclass
class RoutingRecord:
    """The routing decision of one layer and micro batch, kept over activation checkpointing.

    The first forward pass writes the chosen experts here; the recomputation in the backward pass reads them. So a recomputed block
    routes exactly as it did, even where a rounding difference would flip a close top-k.
    """

    topk_ids_TK: torch.Tensor | None = None
