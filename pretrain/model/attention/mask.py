"""Which keys a query may see, as data: each kernel chooses the cheapest way to apply it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn import functional

from pretrain.model.token_parallel import SequenceParallel

Made = TypeVar("Made")


class PackedDocuments(NamedTuple):
    """Where each document begins if all sequences are one row: C + 1 places, int32, ascending.

    The last ones are the number of tokens: the end of the last document, and empty documents.

    Attributes:
        queries_C: first query of each document.
        keys_C: first key of each document.
    """

    queries_C: torch.Tensor
    keys_C: torch.Tensor


@dataclass(frozen=True)
class AttentionMask:
    """Causal, and inside one document if ``document_ids_BS`` is given.

    Every query sees its own token, so no row of the softmax is empty. A mask exists for one forward
    pass, and so does what kernels derive from it.

    Attributes:
        offset: number of keys before the first query (tokens already in the cache).
        document_ids_BS: the document of each token [B, offset + S], those in the cache included.
            Padding is a document of its own. A document's tokens are neighbours.
        max_documents: at least the number of documents in all sequences together; that of their
            tokens by default. Known on the host, so that nobody waits for a device to count them.
        sequence: the ranks that share the sequences; None if this one has all of their tokens.
    """

    offset: int = 0
    document_ids_BS: torch.Tensor | None = None
    max_documents: int | None = None
    sequence: SequenceParallel | None = None
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

    def packed(self, num_queries: int) -> PackedDocuments:
        """The documents as kernels for sequences of any length take them.

        The last ``num_queries`` tokens of each sequence are queries, so a document's queries are
        its last tokens. The host does not wait for the device.
        """

        def make() -> PackedDocuments:
            ids_BU = self.document_ids_BS
            assert ids_BU is not None
            num_keys = ids_BU.shape[1]
            most = ids_BU.numel() if self.max_documents is None else self.max_documents
            begins_BU = functional.pad(ids_BU[:, 1:] != ids_BU[:, :-1], (1, 0), value=True)
            number_T = begins_BU.flatten().cumsum(0) - 1
            keys_C = torch.searchsorted(number_T, torch.arange(most + 1, device=ids_BU.device))
            queries_C = keys_C // num_keys * num_queries + (keys_C % num_keys - self.offset).clamp(
                min=0
            )
            return PackedDocuments(queries_C.int(), keys_C.int())

        return self.once(("packed", num_queries), make)

    def pack_before_compiled_code(self, num_queries: int) -> None:
        """Make :meth:`packed` here, for blocks by ``torch.compile``.

        Inside of them each other ``max_documents`` would be another graph, until the compiler gives
        up; so it is a size of any value.
        """
        for places_C in self.packed(num_queries):
            torch._dynamo.mark_dynamic(places_C, 0)

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
