"""Which keys a query may see: data, so that a kernel can choose the cheapest way to apply it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionMask:
    """Causal, and inside one document where ``document_ids_BS`` is given.

    Attributes:
        offset: number of keys before the first query (tokens already in the cache).
        document_ids_BS: the document of each token [B, S]; only without a cache.
    """

    offset: int = 0
    document_ids_BS: torch.Tensor | None = None

    def is_plain_causal(self, num_queries: int, window: int | None) -> bool:
        """Whether each query sees all tokens up to its own, and nothing has to be masked beyond that."""
        return self.offset == 0 and self.document_ids_BS is None and (window is None or window >= num_queries)

    def dense(self, num_queries: int, num_keys: int, device: torch.device, window: int | None = None) -> torch.Tensor:
        """True where a query may look: [B or 1, 1, num_queries, num_keys] bool."""
        queries = torch.arange(num_queries, device=device)[:, None] + self.offset
        keys = torch.arange(num_keys, device=device)[None, :]
        visible = keys <= queries
        if window is not None:
            visible &= keys > queries - window
        if self.document_ids_BS is None:
            return visible[None, None]
        ids = self.document_ids_BS
        return visible[None, None] & (ids[:, None, :, None] == ids[:, None, None, :])
