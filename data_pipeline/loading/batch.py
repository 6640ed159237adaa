"""The data that a model is trained on: samples of S tokens, and micro batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

# torch's cross_entropy ignores targets of this value by default.
NO_LOSS = -100


@dataclass(frozen=True)
class Batch:
    """One micro batch.

    Attributes:
        input_ids_BS: int64.
        labels_BS: int64, the next token of each input; -100 for no loss.
        document_ids_BS: int64, number of the document inside the sample, from 0; None without a
            document mask.
        max_documents: at least the number of documents of all samples together: a power of two,
            so that it rarely changes. None if it was not counted.
    """

    input_ids_BS: Tensor
    labels_BS: Tensor
    document_ids_BS: Tensor | None = None
    max_documents: int | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        documents = None if self.document_ids_BS is None else self.document_ids_BS.to(device)
        tokens = self.input_ids_BS.to(device), self.labels_BS.to(device)
        return Batch(*tokens, documents, self.max_documents)

    @property
    def position_ids_BS(self) -> Tensor | None:
        """Each token's position in its document, or in the part of it that the sample holds: int64.

        None without a document mask.
        """
        if self.document_ids_BS is None:
            return None
        ids_BS = self.document_ids_BS
        places_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
        # Position 0 always begins a document, even if the sample cuts one: the pad is False there.
        continues_BS = torch.nn.functional.pad(ids_BS[:, 1:] == ids_BS[:, :-1], (1, 0))
        # cummax carries the place of each document's first token to all its tokens.
        return places_BS - places_BS.masked_fill(continues_BS, 0).cummax(dim=1).values


class Sample(NamedTuple):
    """One sequence: inputs, labels and, with a document mask, the documents' numbers.

    Each is int64 [S].
    """

    inputs_S: np.ndarray
    labels_S: np.ndarray
    documents_S: np.ndarray | None

    def part(self, number: int, parts: int) -> Sample:
        """Return one of several equal parts; its labels are the next tokens of the whole."""
        length = len(self.inputs_S) // parts
        here = slice(number * length, (number + 1) * length)
        return Sample(
            self.inputs_S[here],
            self.labels_S[here],
            None if self.documents_S is None else self.documents_S[here],
        )


class Documents(NamedTuple):
    """Documents of one place, by which a user finds them again.

    Attributes:
        place: a shard's prefix; of a stream, a file.
        first, last: their numbers in the data's split, as ``tools/inspect_data.py --document``
            takes them. In a streamed file they are numbers of records, from the start of the part
            that is read in one go.
    """

    place: str
    first: int
    last: int


class Samples(Protocol):
    """The samples that a packing makes of a stream of tokens; they can be read in any order."""

    sequence_length: int

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""

    def read(self, number: int) -> Sample:
        """Return sample ``number``, from 0."""

    def documents(self, number: int) -> list[Documents]:
        """Return the documents of sample ``number``."""


class Origin(NamedTuple):
    """The origin of one sequence of a batch: its source in the mixture, and its documents."""

    source: str
    documents: list[Documents]


def to_batch(samples: Sequence[Sample]) -> Batch:
    """Return the batch [B, S] of B samples."""
    inputs_BS, labels_BS = (
        torch.from_numpy(np.stack(rows))
        for rows in zip(*((sample.inputs_S, sample.labels_S) for sample in samples), strict=True)
    )
    documents = [sample.documents_S for sample in samples if sample.documents_S is not None]
    if not documents:
        return Batch(inputs_BS, labels_BS)
    ids_BS = np.stack(documents)
    # Here, on the host: a GPU would make it wait.
    count = len(ids_BS) + int((ids_BS[:, 1:] != ids_BS[:, :-1]).sum())
    most = 1 << (count - 1).bit_length()
    return Batch(inputs_BS, labels_BS, torch.from_numpy(ids_BS), most)
