"""Megatron's indexed token format, read and written.

``PREFIX.bin`` holds the tokens of all documents back to back, ``PREFIX.idx`` their positions.

The index, little-endian: magic ``MMIDIDX\\0\\0``; u64 version 1; u8 code of the token type; u64
number of sequences; u64 number of document marks; int32 lengths in tokens; int64 byte offsets into
the .bin; int64 document marks (sequence numbers, from 0 to the number of sequences); in a
multimodal data set then a byte a sequence, its mode. Megatron-LM, Megatron-DeepSpeed and GPT-NeoX
read and write it. We write one sequence per document.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import xxhash

from data_pipeline.shards.block_checksums import FileChecksums
from data_pipeline.shards.index_header import HEADER, MAGIC, TOKEN_TYPES, VERSION, read_header
from pretrain.core.errors import DataError, StorageError
from pretrain.core.files import fsync_path

BUILD_AGAIN = "build the shards again with tools/preprocess_data.py --fresh"
LONGEST_DOCUMENT = 2**31 - 1
BLOCK_TOKENS = 1 << 21
# An index of this many sequences is read whole when it is opened: milliseconds.
CHECKED_WHEN_OPENED = 1 << 20

Tokens = np.ndarray[tuple[int], np.dtype[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The token type of Megatron's own preprocessing: uint16 below 65500 entries, else int32."""
    # The limit of Megatron's best_fitting_dtype.
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: Path) -> Path:
    """Return the path of a shard's tokens."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Return the path of a shard's index."""
    return prefix.with_name(prefix.name + ".idx")


@dataclass(frozen=True)
class WrittenShard:
    """The files that a finished writer has put on disk; sizes are in bytes.

    Checksums are hexadecimal: SHA-256, or XXH3 for a shard that is not durable.
    ``bin_blocks`` and ``idx_blocks`` are the checksums of a durable shard's blocks, see
    :mod:`data_pipeline.shards.block_checksums`.
    """

    documents: int
    tokens: int
    bin_bytes: int
    bin_checksum: str
    idx_bytes: int
    idx_checksum: str
    bin_blocks: list[str] = field(default_factory=list)
    idx_blocks: list[str] = field(default_factory=list)


class IndexedWriter:
    """Streams documents to ``prefix``.bin and .idx, in constant memory.

    The files appear under these names only when they are complete.

    Use it as a context manager and call :meth:`finish` inside; leaving without it, or by an
    exception, removes what was written.

    Args:
        durable: bring the files to disk before they get their names; without it they survive a
            killed process, but not a power cut, and their checksums are of the fast kind.

    Raises:
        StorageError: if a file of that name exists already.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any], durable: bool = True) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self.durable = durable
        for path in (bin_path(prefix), idx_path(prefix)):
            if path.exists():
                raise StorageError(
                    f"{path} is there already and would be overwritten: remove it, or choose"
                    " another folder"
                )
        self._temporary = {
            kind: prefix.with_name(f"{prefix.name}.{kind}.partial")
            for kind in ("bin", "idx", "lengths")
        }
        self._bin = self._temporary["bin"].open("wb")
        self._lengths = self._temporary["lengths"].open("w+b")
        self._hash = FileChecksums if durable else xxhash.xxh3_128
        # Hashed while it is written: reading terabytes again for a checksum takes hours.
        self._bin_hash = self._hash()
        # A shard's block is hashed while it is written: both take about as long, and neither holds
        # the interpreter's lock.
        self._hasher = ThreadPoolExecutor(1) if durable else None
        self._hashing: Future[None] | None = None
        self.documents = 0
        self.tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._hasher is not None:
                self._hasher.shutdown()
            self._bin.close()
            self._lengths.close()
        finally:
            for path in self._temporary.values():
                path.unlink(missing_ok=True)

    def add(self, tokens: Tokens, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            tokens: token ids of all documents back to back [n], of any integer type.
            lengths: number of tokens of each document [num_documents].

        Raises:
            DataError: for an id that the shard's type cannot hold, or a document of 2^31 tokens.
        """
        if int(lengths.sum()) != tokens.size:
            raise ValueError(f"{tokens.size} tokens for documents of {lengths.sum()} in all")
        self.add_part(tokens)
        self.end_documents(lengths)
        # The array is the caller's, who may change it from here on.
        self._wait_for_hash()

    def copy(self, reader: IndexedReader, first: int, last: int) -> None:
        """Append sequences first .. last - 1 of another shard of the same token type, in blocks."""
        if reader.dtype != self.dtype:
            raise ValueError(f"{reader.prefix} holds {reader.dtype}, {self.prefix} {self.dtype}")
        begin, end = reader.start_of(first), reader.start_of(last)
        for start in range(begin, end, BLOCK_TOKENS):
            self.add_part(reader.tokens[start : min(start + BLOCK_TOKENS, end)])
        for start in range(first, last, BLOCK_TOKENS):
            self.end_documents(reader.sequence_lengths[start : min(start + BLOCK_TOKENS, last)])

    def add_part(self, tokens: Tokens) -> None:
        """Append tokens, of any integer type, whose documents :meth:`end_documents` ends later.

        The array must not change until the next call: a thread is still hashing it.

        Raises:
            DataError: for an id that the shard's type cannot hold.
        """
        self._append(self._converted(tokens), np.zeros(0, "<i4"))

    def end_documents(self, lengths: np.ndarray) -> None:
        """Append the lengths in tokens of the next documents [num_documents]."""
        if lengths.size and lengths.max() > LONGEST_DOCUMENT:
            raise DataError(
                f"a document of {self.prefix} is longer than {LONGEST_DOCUMENT} tokens: split it"
                " into several"
            )
        self._append(np.zeros(0, self.dtype), lengths)

    def _converted(self, tokens: Tokens) -> Tokens:
        limits = np.iinfo(self.dtype)
        if (
            tokens.dtype != self.dtype
            and tokens.size
            and (tokens.max() > limits.max or (tokens.dtype.kind == "i" and tokens.min() < 0))
        ):
            raise DataError(
                f"token ids from {tokens.min()} to {tokens.max()} do not fit {self.dtype.name} in"
                f" {self.prefix}: use the tokenizer's vocabulary size"
            )
        return np.ascontiguousarray(tokens, dtype=self.dtype)

    def _append(self, tokens: Tokens, lengths: np.ndarray) -> None:
        if self._hasher is None:
            self._bin_hash.update(tokens.data)
        else:
            self._wait_for_hash()
            self._hashing = self._hasher.submit(self._bin_hash.update, tokens.data)
        self._bin.write(tokens.data)
        self._lengths.write(np.ascontiguousarray(lengths, dtype="<i4").data)
        self.tokens += tokens.size
        self.documents += lengths.size

    def _wait_for_hash(self) -> None:
        if self._hashing is not None:
            self._hashing.result()

    def finish(self) -> WrittenShard:
        """Complete both files and give them their names."""
        self._wait_for_hash()
        self._complete(self._bin)
        index_hash = self._hash()
        index_bytes = 0
        with self._temporary["idx"].open("wb") as stream:
            for block in index_content(self.dtype, self.documents, self._read_lengths):
                index_hash.update(block)
                stream.write(block)
                index_bytes += len(block)
            self._complete(stream)
        # The .bin comes first: an .idx must never name tokens that do not exist yet.
        os.replace(self._temporary["bin"], bin_path(self.prefix))
        os.replace(self._temporary["idx"], idx_path(self.prefix))
        if self.durable:
            fsync_path(self.prefix.parent)
        return WrittenShard(
            documents=self.documents,
            tokens=self.tokens,
            bin_bytes=self.tokens * self.dtype.itemsize,
            bin_checksum=self._bin_hash.hexdigest(),
            idx_bytes=index_bytes,
            idx_checksum=index_hash.hexdigest(),
            bin_blocks=_blocks_of(self._bin_hash),
            idx_blocks=_blocks_of(index_hash),
        )

    def _complete(self, stream: BinaryIO) -> None:
        stream.flush()
        if self.durable:
            os.fsync(stream.fileno())

    def _read_lengths(self) -> Iterator[bytes]:
        self._lengths.seek(0)
        return iter(lambda: self._lengths.read(4 * BLOCK_TOKENS), b"")


def index_content(
    dtype: np.dtype[Any], documents: int, read_lengths: Callable[[], Iterator[bytes]]
) -> Iterator[bytes]:
    """Yield an index file of one sequence a document, in blocks.

    Args:
        dtype: of a token.
        read_lengths: the documents' lengths in tokens as int32, in blocks; it is called twice, the
            second time to sum them up to offsets.
    """
    code = next(code for code, known in TOKEN_TYPES.items() if known == dtype)
    yield HEADER.pack(MAGIC, VERSION, code, documents, documents + 1)
    yield from read_lengths()
    offset = 0
    # One offset a document, from the lengths: cumsum in int64, since int32 overflows at 2 GiB.
    for block in read_lengths():
        ends = offset + np.cumsum(np.frombuffer(block, "<i4"), dtype="<i8") * dtype.itemsize
        yield np.concatenate([np.array([offset], "<i8"), ends[:-1]]).tobytes()
        offset = int(ends[-1])
    for start in range(0, documents + 1, BLOCK_TOKENS):
        yield np.arange(start, min(start + BLOCK_TOKENS, documents + 1), dtype="<i8").tobytes()


def _blocks_of(checksums: FileChecksums | xxhash.xxh3_128) -> list[str]:
    return checksums.blocks() if isinstance(checksums, FileChecksums) else []


class IndexedReader:
    """A memory-mapped shard.

    ``reader[i]`` is sequence i; ``reader.tokens`` are all tokens in order.

    Opening takes milliseconds for any size: the header, the sizes of both files and the index's two
    ends are checked, and the whole of a small index. :meth:`check` reads a large one.

    Attributes:
        tokens: [num_tokens], of the shard's token type, mapped from the .bin.
        sequence_lengths: [num_sequences] int32, in tokens, mapped from the .idx.
        document_marks: [num_documents + 1] int64, sequence numbers, mapped from the .idx.
        sequence_modes: [num_sequences] int8 of a multimodal data set, else None.

    Args:
        remedy: what to do about a damaged file, for the error's sentence.

    Raises:
        DataError: for a file that is missing, of another format, cut short, or not consistent; it
            names the file.
    """

    def __init__(self, prefix: Path, remedy: str = BUILD_AGAIN) -> None:
        self.prefix = prefix
        self._remedy = remedy
        index_path = idx_path(prefix)
        token_path = bin_path(prefix)
        for path in (index_path, token_path):
            if not path.is_file():
                raise DataError(f"{path} is missing: {remedy}")
        self.dtype, sequences, marks = read_header(index_path, remedy)
        index = np.memmap(index_path, mode="r", dtype=np.uint8)
        # The header has 34 bytes, so these views are not aligned: frombuffer allows that, and numpy
        # copes with it at little cost.
        end = HEADER.size + 12 * sequences + 8 * marks
        self.sequence_lengths = np.frombuffer(index, "<i4", sequences, HEADER.size)
        self._offsets = np.frombuffer(index, "<i8", sequences, HEADER.size + 4 * sequences)
        self.document_marks = np.frombuffer(index, "<i8", marks, HEADER.size + 12 * sequences)
        self.sequence_modes = (
            np.frombuffer(index, "<i1", sequences, end) if len(index) > end else None
        )
        self._check_ends()
        # An empty file cannot be mapped.
        self.tokens: Tokens = (
            np.memmap(token_path, mode="r", dtype=self.dtype)
            if token_path.stat().st_size
            else np.zeros(0, self.dtype)
        )
        if len(self) <= CHECKED_WHEN_OPENED:
            self.check()

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents, which may have several sequences each in shards of other programs."""
        return len(self.document_marks) - 1

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, sequence: int) -> Tokens:
        """Token ids [length] of one sequence, a view into the file."""
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)} in {self.prefix}")
        return self.tokens[self.start_of(sequence) : self.start_of(sequence + 1)]

    def start_of(self, sequence: int) -> int:
        """Return the first token of a sequence; after the last one, the number of tokens."""
        if sequence == len(self):
            return self.num_tokens
        return int(self._offsets[sequence]) // self.dtype.itemsize

    def document_starts(self, begin: int, end: int) -> np.ndarray:
        """Return where documents begin in tokens begin .. end - 1: int64, sorted.

        Costs two binary searches in the mapped index.
        """
        first, last = (
            bisect_left(self._offsets, token * self.dtype.itemsize) for token in (begin, end)
        )
        starts = np.array(self._offsets[first:last], dtype=np.int64) // self.dtype.itemsize
        if self.num_documents == len(self):
            # A document without a token begins at the same place as the next one.
            return np.unique(starts)
        marks = bisect_left(self.document_marks, first), bisect_left(self.document_marks, last)
        return np.unique(starts[self.document_marks[marks[0] : marks[1]] - first])

    def document_ends(self) -> np.ndarray:
        """Return the number of tokens before the end of each document: int64 [num_documents]."""
        starts = np.append(
            np.asarray(self._offsets, dtype=np.int64) // self.dtype.itemsize, self.num_tokens
        )
        return starts[self.document_marks[1:]]

    def check(self) -> None:
        """Read the whole index, in blocks: lengths, offsets and document marks must agree.

        Raises:
            DataError: for the first entry that does not.
        """
        path = idx_path(self.prefix)
        expected = 0
        for start in range(0, len(self), BLOCK_TOKENS):
            lengths = np.asarray(
                self.sequence_lengths[start : start + BLOCK_TOKENS], dtype=np.int64
            )
            if (lengths < 0).any():
                raise self._damaged(
                    path, f"sequence {start + int((lengths < 0).argmax())} has a negative length"
                )
            ends = expected + np.cumsum(lengths) * self.dtype.itemsize
            begins = np.concatenate([np.array([expected]), ends[:-1]])
            wrong = self._offsets[start : start + BLOCK_TOKENS] != begins
            if wrong.any():
                raise self._damaged(
                    path,
                    f"the offset of sequence {start + int(wrong.argmax())} is not where the one"
                    " before it ends",
                )
            expected = int(ends[-1])
        if expected != self.num_tokens * self.dtype.itemsize:
            found = self.num_tokens * self.dtype.itemsize
            raise self._damaged(
                path,
                f"it counts {expected} bytes of tokens, but {bin_path(self.prefix)} has {found}",
            )
        for start in range(0, self.num_documents, BLOCK_TOKENS):
            if (np.diff(self.document_marks[start : start + BLOCK_TOKENS + 1]) < 0).any():
                raise self._damaged(
                    path,
                    f"its document marks do not rise from 0 to {len(self)}, the number of"
                    " sequences",
                )

    def _check_ends(self) -> None:
        path = idx_path(self.prefix)
        found = bin_path(self.prefix).stat().st_size
        last = (
            int(self._offsets[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
            if len(self)
            else 0
        )
        if last != found:
            raise self._damaged(
                bin_path(self.prefix), f"it has {found} bytes, but its index ends at {last}"
            )
        if len(self) and self._offsets[0] != 0:
            raise self._damaged(path, "the offset of sequence 0 is not 0")
        if self.document_marks[0] != 0 or self.document_marks[-1] != len(self):
            raise self._damaged(
                path,
                f"its document marks do not rise from 0 to {len(self)}, the number of sequences",
            )

    def _damaged(self, path: Path, reason: str) -> DataError:
        return DataError(f"{path} is damaged: {reason}; {self._remedy}")
