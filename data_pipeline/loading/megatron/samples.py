"""The samples of Megatron's GPTDataset, read from our shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.loading.batch import NO_LOSS, Documents, Sample
from data_pipeline.loading.megatron.files import FOLDER
from data_pipeline.loading.megatron.index import SampleIndices
from data_pipeline.loading.packing import documents_at
from data_pipeline.shards.token_stream import TokenStream
from pretrain.core.errors import DataError


@dataclass(frozen=True)
class SampleOptions:
    """What a sample has apart from its tokens.

    Attributes:
        eod_id: the token that ends a document; only needed with one of the others.
        document_mask: number the documents of a sample, whose ends are the tokens ``eod_id``:
            Megatron's ``--reset-position-ids`` with ``--reset-attention-mask``.
        eod_mask_loss: no loss on the token after ``eod_id``: Megatron's ``--eod-mask-loss``.
    """

    eod_id: int | None
    document_mask: bool
    eod_mask_loss: bool


class MegatronSamples:
    """Sample i is item i of Megatron's GPTDataset.

    Documents end where the end-of-document token is, as in Megatron, and not where the index says.
    """

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        indices: SampleIndices,
        options: SampleOptions,
    ) -> None:
        self.stream = stream
        self.sequence_length = sequence_length
        self.indices = indices
        self.options = options

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, number: int) -> Sample:
        """Return one sample.

        Raises:
            DataError: if the indices are damaged.
        """
        # S + 1 tokens make S pairs of input and label.
        text = np.concatenate(
            [self.stream.read(start, count) for start, count in self._pieces(number)]
        )
        inputs, labels = text[:-1], text[1:].copy()
        ends = inputs == self.options.eod_id
        if self.options.eod_mask_loss:
            labels[ends] = NO_LOSS
        if not self.options.document_mask:
            return Sample(inputs, labels, None)
        # The token that ends a document belongs to it: numbers change one place later.
        documents = np.zeros(len(inputs), dtype=np.int64)
        np.cumsum(ends[:-1], out=documents[1:])
        return Sample(inputs, labels, documents)

    def documents(self, number: int) -> list[Documents]:
        """Return the documents of the sample's tokens, its last label included."""
        return [
            found
            for start, count in self._pieces(number)
            if count
            for found in documents_at(self.stream, start, count)
        ]

    def _pieces(self, number: int) -> list[tuple[int, int]]:
        """Return the tokens of a sample: (first token in the stream, their number) by document."""
        indices = self.indices
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        # The files may be anybody's, so nothing in them is trusted.
        sample = int(indices.shuffle[number])
        if not 0 <= sample < len(self):
            raise _damaged(f"sample {number} is number {sample} of {len(self)}")
        (first, offset), (last, end) = indices.samples[sample : sample + 2].tolist()
        if not 0 <= first <= last < len(indices.documents):
            raise _damaged(f"sample {sample} is of the documents {first} to {last}")
        pieces = []
        for place, document in enumerate(indices.documents[first : last + 1].tolist(), first):
            if not 0 <= document < self.stream.num_documents:
                raise _damaged(f"it names the document {document}")
            begin, stop = self.stream.document_span(document)
            start = begin + offset if place == first else begin
            # The last label is the token that the next sample begins with.
            limit = begin + end + 1 if place == last else stop
            if not begin <= start <= limit <= stop:
                raise _damaged(f"sample {sample} reaches out of document {document}")
            pieces.append((start, limit - start))
        if sum(count for _, count in pieces) != self.sequence_length + 1:
            raise _damaged(f"sample {sample} has not {self.sequence_length + 1} tokens")
        return pieces


def _damaged(what: str) -> DataError:
    return DataError(
        f"an index of data.order=megatron is damaged: {what}; remove the folder {FOLDER} next to"
        " the shards, and the next start builds it again"
    )
