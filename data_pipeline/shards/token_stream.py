"""The tokens of several shards as one stream.

A shard is opened when something is read from it, so a corpus of any size starts at once.

Tokens and index entries are read, not mapped: memory does not grow with what has been read, and few
files are open at a time.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shards.index_header import HEADER
from data_pipeline.shards.indexed import IndexedReader, bin_path, idx_path
from data_pipeline.shards.manifest import Manifest, ShardEntry, canonical_sha256
from data_pipeline.shards.split import SplitName
from pretrain.core.errors import DataError

OPEN_FILES = 128
OFFSETS_AT_ONCE = 512


class ReadFile:
    """A file of which parts are read, by any thread.

    Raises:
        DataError: if it cannot be read, or ends too early.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, start: int, count: int, dtype: np.dtype[Any]) -> np.ndarray:
        """``count`` numbers from byte ``start`` on."""
        size = count * dtype.itemsize
        try:
            # pread has no file position, so several threads can read through one descriptor.
            content = os.pread(_opened(self).number, size, start)
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read: {error.strerror}; fix that, then run the same command"
                " again"
            ) from None
        if len(content) < size:
            raise DataError(
                f"{self.path} ends too early: build the data again with tools/preprocess_data.py"
                " --fresh"
            )
        return np.frombuffer(content, dtype)


class _Descriptor:
    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    # Closed when the last user is gone, not when the cache evicts it: another thread may be
    # reading.
    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(OPEN_FILES)
def _opened(file: ReadFile) -> _Descriptor:
    return _Descriptor(file.path)


class _Offsets:
    """The byte offsets of an index, as a sequence that is read entry by entry."""

    def __init__(self, file: ReadFile, sequences: int) -> None:
        self.file = file
        self.sequences = sequences

    def __len__(self) -> int:
        return self.sequences

    def __getitem__(self, number: int) -> int:
        return int(self.part(number, 1)[0])

    def part(self, first: int, count: int) -> np.ndarray:
        return self.file.read(
            HEADER.size + 4 * self.sequences + 8 * first,
            min(count, self.sequences - first),
            np.dtype("<i8"),
        )


class Shard:
    """One shard as its manifest describes it.

    Args:
        first_document: its first document's number in the split.
    """

    def __init__(
        self, folder: Path, entry: ShardEntry, dtype: str, first_document: int = 0
    ) -> None:
        self.prefix = folder / entry.prefix
        self.entry = entry
        self.dtype = np.dtype(dtype)
        self.first_document = first_document
        self._bin = ReadFile(bin_path(self.prefix))
        self._offsets: _Offsets | None = None

    def open(self) -> IndexedReader:
        """The shard's files, checked.

        Raises:
            DataError: for a shard that is missing, damaged, or not the one of the manifest.
        """
        reader = IndexedReader(self.prefix)
        if (reader.num_tokens, reader.dtype) != (self.entry.tokens, self.dtype):
            raise DataError(
                f"{bin_path(self.prefix)} holds {reader.num_tokens} tokens of {reader.dtype.name},"
                f" its manifest says {self.entry.tokens} of {self.dtype.name}: build the data again"
                " with tools/preprocess_data.py --fresh"
            )
        return reader

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Token ids begin .. end - 1."""
        self._check_once()
        return self._bin.read(begin * self.dtype.itemsize, end - begin, self.dtype)

    def document_starts(self, begin: int, end: int) -> np.ndarray:
        """Return where documents begin in tokens begin .. end - 1: int64, sorted."""
        offsets = self._check_once()
        size = self.dtype.itemsize
        number = bisect_left(offsets, begin * size)
        parts = [np.zeros(0, "<i8")]
        while number < len(offsets):
            part = offsets.part(number, OFFSETS_AT_ONCE)
            inside = int(np.searchsorted(part, end * size))
            parts.append(part[:inside])
            if inside < len(part):
                break
            number += len(part)
        # A document without a token begins where the next one does.
        return np.unique(np.concatenate(parts) // size)

    def document_span(self, number: int) -> tuple[int, int]:
        """Return the first token of a document, from 0, and the one after its last."""
        offsets = self._check_once()
        size = self.dtype.itemsize
        found = offsets.part(number, 2) // size
        return int(found[0]), int(found[1]) if len(found) > 1 else self.entry.tokens

    def documents(self, begin: int, end: int) -> tuple[int, int]:
        """Return the numbers in the split of the documents with the tokens begin and end - 1."""
        offsets = self._check_once()
        size = self.dtype.itemsize
        return (
            self.first_document + bisect_right(offsets, begin * size) - 1,
            self.first_document + bisect_left(offsets, end * size) - 1,
        )

    def _check_once(self) -> _Offsets:
        if self._offsets is None:
            reader = self.open()
            if reader.num_documents != len(reader):
                raise DataError(
                    f"{idx_path(self.prefix)} has documents of several sequences: build the data"
                    " with tools/preprocess_data.py, which writes one each"
                )
            self._offsets = _Offsets(ReadFile(idx_path(self.prefix)), len(reader))
        return self._offsets


class TokenStream:
    """The tokens of all shards, one after the other, as one stream across documents and shards."""

    def __init__(self, shards: list[Shard], vocab_size: int) -> None:
        self.shards = shards
        self.vocab_size = vocab_size
        self._starts = np.cumsum([0, *(shard.entry.tokens for shard in shards)], dtype=np.int64)

        self._first_documents = np.cumsum(
            [0, *(shard.entry.documents for shard in shards)], dtype=np.int64
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return int(self._starts[-1])

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return int(self._first_documents[-1])

    def start_of(self, shard: int) -> int:
        """Return the place in the stream at which the tokens of a shard begin."""
        return int(self._starts[shard])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1: int64 [count].

        Raises:
            IndexError: if the stream does not have them.
            DataError: for a token id that the vocabulary does not have; it names the shard.
        """
        # int64, because torch's embedding and cross_entropy take no uint16.
        result = np.empty(count, dtype=np.int64)
        for shard, begin, end, filled in self._pieces(start, count):
            part = shard.tokens(begin, end)
            self._check(part, shard)
            result[filled : filled + len(part)] = part
        return result

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """Return which of the tokens start .. start + count - 1 begin a document.

        They are int64 in [0, count), sorted, by the shards' indexes.
        """
        found = [
            shard.document_starts(begin, end) + (filled - begin)
            for shard, begin, end, filled in self._pieces(start, count)
        ]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def document_span(self, number: int) -> tuple[int, int]:
        """Return the first token of document ``number`` of all shards, and the one after its last.

        Raises:
            IndexError: if there is no such document.
        """
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of a stream of {self.num_documents}")
        shard = int(np.searchsorted(self._first_documents, number, side="right")) - 1
        begin, end = self.shards[shard].document_span(number - int(self._first_documents[shard]))
        return self.start_of(shard) + begin, self.start_of(shard) + end

    def ranges(self, start: int, count: int) -> list[tuple[Shard, int, int]]:
        """Return the places of ``count`` tokens: (shard, first and last + 1 token in it)."""
        return [(shard, begin, end) for shard, begin, end, _ in self._pieces(start, count)]

    def _pieces(self, start: int, count: int) -> list[tuple[Shard, int, int, int]]:
        """Return the shards that hold these tokens.

        Each as (shard, first and last + 1 token in it, number of tokens before them).
        """
        if not 0 <= start <= start + count <= self.num_tokens:
            raise IndexError(f"tokens {start} to {start + count} of a stream of {self.num_tokens}")
        pieces = []
        filled = 0
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < count:
            inside = start + filled - self.start_of(number)
            taken = min(count - filled, self.shards[number].entry.tokens - inside)
            if taken:
                pieces.append((self.shards[number], inside, inside + taken, filled))
            filled += taken
            number += 1
        return pieces

    def _check(self, part: np.ndarray, shard: Shard) -> None:
        # An id beyond the embedding would read foreign memory or end a CUDA kernel with a useless
        # error.
        if part.size and (part.max() >= self.vocab_size or part.min() < 0):
            raise DataError(
                f"{bin_path(shard.prefix)} holds token ids from {part.min()} to {part.max()}, but"
                f" its tokenizer has {self.vocab_size} entries: it is damaged, or belongs to"
                " another tokenizer; build the data again with tools/preprocess_data.py --fresh"
            )


def open_split(manifest: Manifest, split: SplitName, source: str | None = None) -> TokenStream:
    """The token stream of a data folder's split, or of one source of it.

    Raises:
        DataError: if the folder has no such split.
    """
    if split not in manifest.splits:
        raise DataError(
            f"the data in {manifest.folder} has no {split} split: build it again with another"
            " data.validation_share"
        )
    entries = manifest.splits[split].shards
    firsts = accumulate((entry.documents for entry in entries), initial=0)
    shards = [
        Shard(manifest.folder, entry, manifest.dtype, first)
        for entry, first in zip(entries, firsts)
        if source in (None, entry.source)
    ]
    return TokenStream(shards, manifest.tokenizer.vocab_size)


def source_fingerprint(manifest: Manifest, source: str) -> str:
    """Return the SHA-256 of what training reads of one source: its tokenizer and training shards.

    Other sources of the same folder have no influence on it.
    """
    shards = [
        [entry.tokens, entry.bin_sha256, entry.idx_sha256]
        for entry in manifest.splits["train"].shards
        if entry.source == source and entry.tokens
    ]
    return canonical_sha256(
        {"tokenizer": manifest.tokenizer.sha256, "dtype": manifest.dtype, "shards": shards}
    )
