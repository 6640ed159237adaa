"""Which keys a query may see: data, so that a kernel can choose the cheapest way to apply it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


@dataclass(frozen=True)
class AttentionMask:
    """Causal, and inside one document where ``document_ids_BS`` is given.

    Every query sees its own token, so that no row is empty.

    It lives for one forward pass, and so does what kernels make of it.

    Attributes:
        offset: number of keys before the first query (tokens already in the cache).
        document_ids_BS: the document of each token [B, offset + S], those in the cache included.
            Padding is a document of its own.
    """

    offset: int = 0
    document_ids_BS: torch.Tensor | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` returned at the first call with this key: layers that ask for the same
        share it.
        """
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def is_trivial(self, num_queries: int, window: int | None) -> bool:
        """Whether causality is all: no window that cuts, no documents, and no cached keys or a
        single query, which sees them all.
        """
        narrow = window is not None and window < self.offset + num_queries
        return (
            self.document_ids_BS is None and not narrow and (self.offset == 0 or num_queries == 1)
        )

    def distance(self, num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
        """How many tokens a key is before a query, [num_queries, num_keys] int64.

        Below 0 where it comes later.
        """
        queries = torch.arange(self.offset, self.offset + num_queries, device=device)
        return queries[:, None] - torch.arange(num_keys, device=device)[None, :]

    def dense(
        self, num_queries: int, num_keys: int, device: torch.device, window: int | None = None
    ) -> torch.Tensor:
        """True where a query may look: [B or 1, 1, num_queries, num_keys] bool."""

        def make() -> torch.Tensor:
            distance = self.distance(num_queries, num_keys, device)
            visible = distance >= 0
            if window is not None:
                visible &= distance < window
            if self.document_ids_BS is None:
                return visible[None, None]
            ids = self.document_ids_BS
            return visible[None, None] & (
                ids[:, None, self.offset :, None] == ids[:, None, None, :]
            )

        return self.once(("dense", num_queries, num_keys, window), make)
