"""Megatron's indexed token format: ``PREFIX.bin`` holds the tokens of all documents back to back, ``PREFIX.idx`` says where each one lies.

The index, little-endian: magic ``MMIDIDX\\0\\0``; u64 version 1; u8 code of the token type; u64 number of sequences; u64 number of document
marks; int32 lengths in tokens; int64 byte offsets into the .bin; int64 document marks (sequence numbers, from 0 to the number of sequences).
Both Megatron-LM and Megatron-DeepSpeed read and write it. We write one sequence per document.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pretrain.config.durable import fsync_path
from pretrain.config.errors import DataError, StorageError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
FLOAT_CODES = {6: "float64", 7: "float32"}
LONGEST_DOCUMENT = 2**31 - 1

Tokens = np.ndarray[tuple[int], np.dtype[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The token type of Megatron's own preprocessing: uint16 below 65500 entries, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


@dataclass(frozen=True)
class WrittenShard:
    """What a finished writer put on disk; sizes in bytes, checksums as hexadecimal SHA-256."""

    documents: int
    tokens: int
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str


class IndexedWriter:
    """Streams documents to ``prefix``.bin and .idx, which appear under these names only once they are complete.

    Use it as a context manager and call :meth:`finish` inside; leaving without it, or by an exception, removes what was written.

    Raises:
        StorageError: where a file of that name is there already.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self.prefix, self.dtype = prefix, dtype
        self._code = next(code for code, known in TOKEN_TYPES.items() if known == dtype)
        for path in (bin_path(prefix), idx_path(prefix)):
            if path.exists():
                raise StorageError(f"{path} is there already and would be overwritten: remove it, or choose another folder")
        self._temporary_bin = bin_path(prefix).with_suffix(".bin.partial")
        self._temporary_idx = idx_path(prefix).with_suffix(".idx.partial")
        self._bin = self._temporary_bin.open("wb")
        self._bin_hash = hashlib.sha256()
        self._lengths: list[int] = []
        self._open_length = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._bin.close()
        finally:
            self._temporary_bin.unlink(missing_ok=True)
            self._temporary_idx.unlink(missing_ok=True)

    def add(self, tokens: Tokens) -> None:
        """Appends token ids [n], of any integer type, to the document that is being written.

        Raises:
            DataError: for an id that the shard's type cannot hold, or a document of 2^31 tokens.
        """
        if tokens.size == 0:
            return
        limits = np.iinfo(self.dtype)
        if tokens.min() < max(limits.min, 0) or tokens.max() > limits.max:
            raise DataError(
                f"token ids from {tokens.min()} to {tokens.max()} do not fit {self.dtype.name} in {self.prefix}: use the tokenizer's vocabulary size"
            )
        self._open_length += tokens.size
        if self._open_length > LONGEST_DOCUMENT:
            raise DataError(f"document {len(self._lengths)} of {self.prefix} is longer than {LONGEST_DOCUMENT} tokens: split it into several files")
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data
        self._bin_hash.update(data)
        self._bin.write(data)

    def end_document(self) -> None:
        """Closes the document: all that was added since the last one."""
        self._lengths.append(self._open_length)
        self._open_length = 0

    def finish(self) -> WrittenShard:
        """Brings both files to disk and gives them their names, the .bin first: an .idx never stands for tokens that are not there."""
        self._bin.flush()
        os.fsync(self._bin.fileno())
        index = self._index()
        with self._temporary_idx.open("wb") as stream:
            stream.write(index)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(self._temporary_bin, bin_path(self.prefix))
        os.replace(self._temporary_idx, idx_path(self.prefix))
        fsync_path(self.prefix.parent)
        tokens = sum(self._lengths)
        return WrittenShard(
            documents=len(self._lengths),
            tokens=tokens,
            bin_bytes=tokens * self.dtype.itemsize,
            bin_sha256=self._bin_hash.hexdigest(),
            idx_bytes=len(index),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )

    def _index(self) -> bytes:
        lengths = np.array(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
        offsets = np.concatenate([np.zeros(1, dtype="<i8"), ends[:-1]])[: len(lengths)]
        marks = np.arange(len(lengths) + 1, dtype="<i8")
        header = HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(marks))
        return header + lengths.tobytes() + offsets.tobytes() + marks.tobytes()


class IndexedReader:
    """A memory-mapped shard. ``reader[i]`` is sequence i; ``reader.tokens`` are all tokens in order.

    Attributes:
        tokens: [num_tokens], of the shard's token type, mapped from the .bin.
        sequence_lengths: [num_sequences] int32, in tokens.
        sequence_starts: [num_sequences + 1] int64, in tokens, from 0 to num_tokens.
        document_marks: [num_documents + 1] int64, sequence numbers.

    Raises:
        DataError: for a file that is missing, of another format, cut short, or not consistent; it names the file.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index_path, token_path = idx_path(prefix), bin_path(prefix)
        for path in (index_path, token_path):
            if not path.is_file():
                raise DataError(f"{path} is missing: build the shards again with tools/preprocess_data.py --fresh")
        self.dtype, sequences, marks = _read_header(index_path)
        index = np.memmap(index_path, mode="r", dtype=np.uint8)
        self.sequence_lengths = np.frombuffer(index, "<i4", sequences, HEADER.size)
        offsets = np.frombuffer(index, "<i8", sequences, HEADER.size + 4 * sequences)
        self.document_marks = np.frombuffer(index, "<i8", marks, HEADER.size + 12 * sequences)
        self.sequence_starts = self._checked_starts(offsets)
        self._check_marks()
        self.tokens: Tokens = np.memmap(token_path, mode="r", dtype=self.dtype) if token_path.stat().st_size else np.zeros(0, self.dtype)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.document_marks) - 1

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, sequence: int) -> Tokens:
        """Token ids [length] of one sequence, a view into the file."""
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)} in {self.prefix}")
        return self.tokens[self.sequence_starts[sequence] : self.sequence_starts[sequence + 1]]

    def _checked_starts(self, offsets: np.ndarray) -> np.ndarray:
        path = idx_path(self.prefix)
        if (self.sequence_lengths < 0).any():
            raise _damaged(path, f"sequence {int((self.sequence_lengths < 0).argmax())} has a negative length")
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sequence_lengths, dtype=np.int64)])
        wrong = offsets != starts[:-1] * self.dtype.itemsize
        if wrong.any():
            raise _damaged(path, f"the offset of sequence {int(wrong.argmax())} is not where the one before it ends")
        expected, found = int(starts[-1]) * self.dtype.itemsize, bin_path(self.prefix).stat().st_size
        if expected != found:
            raise _damaged(bin_path(self.prefix), f"it has {found} bytes, but its index counts {starts[-1]} tokens = {expected} bytes")
        return starts

    def _check_marks(self) -> None:
        marks = self.document_marks
        if marks[0] != 0 or marks[-1] != len(self) or (np.diff(marks) < 0).any():
            raise _damaged(idx_path(self.prefix), f"its document marks do not rise from 0 to {len(self)}, the number of sequences")


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged: {reason}; build the shards again with tools/preprocess_data.py --fresh")


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """Token type, number of sequences and number of document marks; the counts are checked against the file's size before any use."""
    with path.open("rb") as stream:
        head = stream.read(HEADER.size)
    if head[: len(MAGIC)] != MAGIC:
        raise DataError(f"{path} is not an index in Megatron's format (it does not begin with MMIDIDX): give the prefix of a .bin/.idx pair")
    if len(head) < HEADER.size:
        raise _damaged(path, f"it ends after {len(head)} bytes, inside its header")
    _, version, code, sequences, marks = HEADER.unpack(head)
    if version != VERSION:
        raise DataError(f"{path} has index version {version}, this reader knows version {VERSION}: write it again with tools/preprocess_data.py")
    if code not in TOKEN_TYPES:
        what = f"{FLOAT_CODES[code]} numbers, not token ids" if code in FLOAT_CODES else f"an unknown token type (code {code})"
        raise DataError(f"{path} announces {what}: write it again with tools/preprocess_data.py")
    expected, found = HEADER.size + 12 * sequences + 8 * marks, path.stat().st_size
    if expected != found:
        raise _damaged(path, f"it has {found} bytes, but {sequences} sequences and {marks} document marks need {expected}")
    if marks == 0:
        raise _damaged(path, "it has no document marks")
    return TOKEN_TYPES[code], sequences, marks
