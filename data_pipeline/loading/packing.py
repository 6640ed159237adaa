"""From a stream of tokens to samples of S tokens: windows of it, or packed documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.config import BestFit, DataConfig
from data_pipeline.loading.batch import NO_LOSS, Documents, Sample, Samples
from data_pipeline.loading.best_fit import PackedShard, PackingStatistics, pack_stream
from data_pipeline.shards.datasets import Datasets, SourceShards
from data_pipeline.shards.token_stream import TokenStream

PADDING_WINDOW = -1


class Windows:
    """Fixed windows of S tokens with one target each.

    Window i has the inputs i*S .. i*S + S - 1, and as labels the same range one token further.

    A document continues in the next window, and a token that ends a document belongs to it. With
    ``document_mask`` no loss is taken on the first token of the next document.

    Attributes:
        num_all: all windows, a shorter last one too: together they score each token but the first
            exactly once. ``len()`` counts the full ones, which training uses.
    """

    def __init__(
        self, stream: TokenStream, sequence_length: int, pad_id: int, document_mask: bool = False
    ) -> None:
        self.stream = stream
        self.sequence_length = sequence_length
        self.pad_id = pad_id
        self.document_mask = document_mask
        self._targets = max(stream.num_tokens - 1, 0)
        self.num_all = -(-self._targets // sequence_length)

    def of_length(self, sequence_length: int) -> Windows:
        """Return the same stream in windows of another length."""
        return Windows(self.stream, sequence_length, self.pad_id, self.document_mask)

    def __len__(self) -> int:
        return self._targets // self.sequence_length

    def read(self, number: int) -> Sample:
        """Return one window.

        A missing tail is ``pad_id`` and -100, in a document of its own; so is all of the window -1.
        """
        length = self.sequence_length
        if number == PADDING_WINDOW:
            inputs = np.full(length, self.pad_id, dtype=np.int64)
            labels = np.full(length, NO_LOSS, dtype=np.int64)
            return Sample(
                inputs, labels, np.zeros(length, dtype=np.int64) if self.document_mask else None
            )
        if not 0 <= number < self.num_all:
            raise IndexError(f"window {number} of {self.num_all}")
        return self.read_at(number * length)

    def documents(self, number: int) -> list[Documents]:
        """Return the documents of the window's tokens, its last target included."""
        start = number * self.sequence_length
        return documents_at(
            self.stream, start, min(self.sequence_length, self._targets - start) + 1
        )

    def read_at(self, start: int) -> Sample:
        """Return the window whose first input is token ``start`` of the stream.

        At the end of the stream it is shorter, and padded.
        """
        length = self.sequence_length
        inputs = np.full(length, self.pad_id, dtype=np.int64)
        labels = np.full(length, NO_LOSS, dtype=np.int64)
        # S + 1 tokens make S pairs of input and label, so neighbouring windows share one token.
        targets = min(length, self._targets - start)
        tokens = self.stream.read(start, targets + 1)
        inputs[:targets], labels[:targets] = tokens[:-1], tokens[1:]
        if not self.document_mask:
            return Sample(inputs, labels, None)
        # Label i is token start + i + 1, so these places index the labels: their targets begin
        # documents.
        begins = self.stream.document_starts(start + 1, targets)
        labels[begins] = NO_LOSS
        # Inputs change their document one place later than labels; the padding is one more
        # document.
        changes = np.zeros(length + 1, dtype=np.int64)
        changes[begins + 1] = 1
        changes[targets] = 1
        return Sample(inputs, labels, np.cumsum(changes[:length]))


class PackedSamples:
    """Documents packed by best fit.

    Every token of every document is an input exactly once an epoch.

    A label is the next token of the same document, also if the document is cut. What is left at
    the end is ``pad_id``, without loss and in a document of its own.

    Raises:
        DataError: if a shard of the stream is not packed yet, see
            :func:`data_pipeline.loading.best_fit.pack_stream`.
    """

    def __init__(
        self, stream: TokenStream, sequence_length: int, pad_id: int, document_mask: bool = False
    ) -> None:
        self.stream = stream
        self.sequence_length = sequence_length
        self.pad_id = pad_id
        self.document_mask = document_mask
        self._shards = [PackedShard(shard, sequence_length) for shard in stream.shards]
        self._starts = np.cumsum([0, *map(len, self._shards)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, number: int) -> Sample:
        """Return one packed sequence."""
        if not 0 <= number < len(self):
            raise IndexError(f"sequence {number} of {len(self)}")
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        length = self.sequence_length
        offset = self.stream.start_of(shard)
        inputs = np.full(length, self.pad_id, dtype=np.int64)
        labels = np.full(length, NO_LOSS, dtype=np.int64)
        documents = np.zeros(length, dtype=np.int64)
        filled = 0
        for document, (start, count) in enumerate(
            self._shards[shard].pieces(number - int(self._starts[shard]))
        ):
            # A piece that is cut fills its sequence, and only then its last input has a label: the
            # first token of the rest.
            peek = int(count == length and self._continues(offset + start + count))
            tokens = self.stream.read(offset + start, count + peek)
            inputs[filled : filled + count] = tokens[:count]
            labels[filled : filled + len(tokens) - 1] = tokens[1:]
            documents[filled:] = document
            filled += count
            documents[filled:] = document + 1
        return Sample(inputs, labels, documents if self.document_mask else None)

    def documents(self, number: int) -> list[Documents]:
        """Return the documents that are packed in the sequence, piece by piece."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        offset = self.stream.start_of(shard)
        pieces = self._shards[shard].pieces(number - int(self._starts[shard]))
        return [
            documents
            for start, count in pieces
            for documents in documents_at(self.stream, offset + start, count)
        ]

    def _continues(self, token: int) -> bool:
        return token < self.stream.num_tokens and not len(self.stream.document_starts(token, 1))


class Joined:
    """The samples of several streams, one after the other; none crosses from one to the next."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = parts
        self.sequence_length = parts[0].sequence_length
        self._starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, number: int) -> Sample:
        """Return sample ``number`` of all."""
        part, within = self._find(number)
        return part.read(within)

    def documents(self, number: int) -> list[Documents]:
        """Return the documents of sample ``number`` of all."""
        part, within = self._find(number)
        return part.documents(within)

    def _find(self, number: int) -> tuple[Samples, int]:
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.parts[part], number - int(self._starts[part])


def documents_at(stream: TokenStream, start: int, count: int) -> list[Documents]:
    """Return the documents of tokens start .. start + count - 1, an entry for each shard."""
    return [
        Documents(str(shard.prefix), *shard.documents(begin, end))
        for shard, begin, end in stream.ranges(start, count)
    ]


def training_samples(
    parts: Sequence[SourceShards], config: DataConfig, sequence_length: int, pad_id: int
) -> Samples:
    """Return the samples of one source of the mixture, as the recipe packs them."""
    kind = PackedSamples if isinstance(config.packing, BestFit) else Windows
    samples = [kind(part.stream, sequence_length, pad_id, config.document_mask) for part in parts]
    # One shard folder needs no index over several.
    return samples[0] if len(samples) == 1 else Joined(samples)


def prepare_packing(
    datasets: Datasets, config: DataConfig, sequence_length: int, progress: bool = False
) -> PackingStatistics | None:
    """Pack what is not packed yet, on one process.

    Returns None if the recipe's packing needs nothing prepared.

    Raises:
        StorageError: if a data folder cannot be written to.
    """
    return (
        packing_statistics(datasets, sequence_length, progress)
        if isinstance(config.packing, BestFit)
        else None
    )


def packing_statistics(
    datasets: Datasets, sequence_length: int, progress: bool = False
) -> PackingStatistics:
    """Return the padding and the cuts that best-fit packing has on the training split.

    Shards that are packed already are not packed again.
    """
    streams = [part.stream for parts in datasets.training_shards().values() for part in parts]
    return pack_stream(
        TokenStream(
            [shard for stream in streams for shard in stream.shards], datasets.tokenizer.vocab_size
        ),
        sequence_length,
        progress,
    )
