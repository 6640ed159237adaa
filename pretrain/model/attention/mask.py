"""Which keys a query may see, as data: each kernel chooses the cheapest way to apply it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


@dataclass(frozen=True)
class AttentionMask:
    """Causal, and inside one document if ``document_ids_BS`` is given.

    Every query sees its own token, so no row of the softmax is empty. A mask exists for one forward
    pass, and so does what kernels derive from it.

    Attributes:
        offset: number of keys before the first query (tokens already in the cache).
        document_ids_BS: the document of each token [B, offset + S], those in the cache included.
            Padding is a document of its own.
    """

    offset: int = 0
    document_ids_BS: torch.Tensor | None = None
    # A cache; the mask itself does not change.
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """The return value of the first ``make`` with this key, shared by all layers."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def is_trivial(self, num_queries: int, window: int | None) -> bool:
        """Whether the mask is plain causality, or none at all.

        That is: no documents, no window that cuts, and either no cached keys or a single query,
        which sees them all.
        """
        narrow = window is not None and window < self.offset + num_queries
        return (
            self.document_ids_BS is None and not narrow and (self.offset == 0 or num_queries == 1)
        )

    def distance(self, num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
        """How many tokens a key is before a query, [num_queries, num_keys] int64; < 0 if later."""
        queries = torch.arange(self.offset, self.offset + num_queries, device=device)
        return queries[:, None] - torch.arange(num_keys, device=device)[None, :]

    def dense(
        self, num_queries: int, num_keys: int, device: torch.device, window: int | None = None
    ) -> torch.Tensor:
        """True if a query may see a key: [B or 1, 1, num_queries, num_keys] bool."""

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
