"""The interface of every kind of MoE layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import distributed, nn

from pretrain.model.token_parallel import TokenParts


class RouterStatistics(NamedTuple):
    """The routing of one micro batch by one layer; fp32, on the device, not synchronised.

    Attributes:
        losses_J: [J] the losses of ``losses.LOSSES`` in that order, unweighted, differentiable.
        counts_E: [E] tokens that chose each expert, over all top_k choices, before any drop.
        entropy: [] mean entropy of a token's probabilities, nats.
        dropped: [] share of the choices that were dropped because their expert was full.
    """

    losses_J: torch.Tensor
    counts_E: torch.Tensor
    entropy: torch.Tensor
    dropped: torch.Tensor


@dataclass
class RoutingRecord:
    """The routing of one layer and micro batch, kept for activation checkpointing.

    The first forward pass writes the chosen experts here; the recomputation in the backward pass
    reads them. So a recomputed block routes exactly as it did, even if a rounding difference would
    flip a close top-k, and ranks do not exchange their counts a second time.

    Attributes:
        topk_ids_TK: the chosen experts.
        plan: what the layer's exchange between ranks has found out about them, so that the
            recomputation asks neither the other ranks nor the device again.
        keeps_rows: whether rows that ranks exchange are kept too (selective recomputation).
    """

    topk_ids_TK: torch.Tensor | None = None
    plan: Any = None
    keeps_rows: bool = False
    _rows: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def keep(self, name: str, rows: torch.Tensor) -> None:
        """Keep what an exchange has brought for the recomputation, if that is asked for.

        Args:
            name: of the exchange in its layer.
        """
        if self.keeps_rows:
            self._rows[name] = rows.detach().requires_grad_(rows.requires_grad)

    def kept(self, name: str) -> torch.Tensor | None:
        """In a recomputation what :meth:`keep` has kept, once: memory is free again after it."""
        return self._rows.pop(name, None)

    def exchanged(self, name: str, exchange: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The rows that ``exchange`` returns, or in a recomputation those that were kept."""
        kept = self.kept(name)
        if kept is not None:
            return kept
        rows = exchange()
        self.keep(name, rows)
        return rows


class Stream(NamedTuple):
    """Elements of a parameter that come from one named stream of random values.

    A stream is drawn at once, as a tensor of ``shape``; the parameter may take a part of it. Both
    are counted in elements, flat and in row-major order.

    Attributes:
        name: of the stream, which seeds it.
        start: the first of these elements in the parameter.
        first, last: those that it takes of the stream, ``last`` excluded.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    first: int
    last: int


def whole_stream(name: str, shape: torch.Size, start: int = 0) -> Stream:
    """A stream of which a parameter takes all elements, from its element ``start`` on."""
    return Stream(name, tuple(shape), start, 0, shape.numel())


class MoELayer:
    """What every MoE layer offers in addition to ``nn.Module``.

    A mixin and no module, because the module's own class may be one of DeepSpeed's.
    ``forward(x_BSD, record, fractions_E)`` returns [B, S, D] and the router's statistics, or None.

    Attributes:
        token_parts: the ranks that have the other tokens of the layer's sequences, for
            ``router_statistics``; None if there are none.
    """

    token_parts: TokenParts | None = None

    @abstractmethod
    def expert_streams(self, name: str) -> Iterator[tuple[nn.Parameter, list[Stream]]]:
        """Yield each parameter of the routed experts that this rank holds, with its streams.

        Each expert's streams are named by its global index, ``{name}.expert.{index}.{parameter}``:
        a model does not depend on the kind of layer or on how many ranks share it. Parameters may
        be on the meta device: only their shapes are read here.

        Args:
            name: of this layer in the model.
        """

    @property
    def counted_choices_E(self) -> torch.Tensor | None:
        """How often this rank's tokens chose each expert in training, [E] int64.

        None for layers that report it in their :class:`RouterStatistics`. The reader resets it to
        zero.
        """
        return None

    def share_experts(self, group: distributed.ProcessGroup | None, device: torch.device) -> None:
        """Set the ranks that share a table layer's experts, and the device of its buffers.

        DeepSpeed does this for the other kinds.
        """
        return
