"""What every kind of MoE layer takes, returns, and does for whoever holds it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import distributed


class RouterStatistics(NamedTuple):
    """The routing of one micro batch by one layer; fp32, on the device, no host synchronisation.

    Attributes:
        losses_J: [J] the losses of ``losses.LOSSES`` in that order, unweighted, differentiable.
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

    The first forward pass writes the chosen experts here; the recomputation in the backward pass
    reads them. So a recomputed block routes exactly as it did, even if a rounding difference would
    flip a close top-k.
    """

    topk_ids_TK: torch.Tensor | None = None


# Fills a tensor with the random values that belong to a name.
Fill = Callable[[torch.Tensor, str], None]


class MoELayer:
    """What every kind of layer is beside a module: its module class may be one of DeepSpeed's.

    ``forward(x_BSD, record, fractions_E)`` returns [B, S, D] and the router's statistics, or None.
    """

    @abstractmethod
    def fill_experts(self, name: str, fill: Fill) -> list[torch.Tensor]:
        """Fills the routed experts that this rank holds, and returns their parameters.

        Each expert's values are named by its global number, ``{name}.expert.{number}.{parameter}``:
        a model does not depend on the kind of layer or on how many ranks share it.

        Args:
            name: of this layer in the model.
        """

    @property
    def counted_choices_E(self) -> torch.Tensor | None:
        """How often tokens of this rank chose each expert in training, [E] int64.

        None for layers whose :class:`RouterStatistics` say it. Whoever reads it sets it to zero.
        """
        return None

    def share_experts(self, group: distributed.ProcessGroup | None, device: torch.device) -> None:
        """Gives a layer of tables the ranks that share one set of its experts, and their device.

        DeepSpeed does this for the other kinds.
        """
        return
