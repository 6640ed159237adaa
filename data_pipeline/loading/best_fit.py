"""Best-fit-decreasing packing of a shard's documents into sequences (Ding et al. 2024).

The paper is "Fewer Truncations Improve Language Modeling".

Documents longer than a sequence are cut into pieces of S tokens and a rest. The pieces go into
sequences from the longest to the shortest, each into the fullest sequence that it still fits
into. The result is next to the shard, as ``PREFIX.pack-S.safetensors``.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from data_pipeline.shards.indexed import IndexedReader
from data_pipeline.shards.token_stream import ReadFile, Shard, TokenStream
from pretrain.core.errors import DataError, StorageError
from pretrain.core.files import write_synced


def pack_path(prefix: Path, sequence_length: int) -> Path:
    """Return the path of the packing next to a shard."""
    return prefix.with_name(f"{prefix.name}.pack-{sequence_length}.safetensors")


@dataclass(frozen=True)
class PackingStatistics:
    """Counts of sequences, tokens and cut documents of a packing."""

    sequence_length: int
    sequences: int
    tokens: int
    documents: int
    truncated_documents: int

    @property
    def padding_share(self) -> float:
        """Share of all positions in the sequences that have no token."""
        return 1 - self.tokens / (self.sequences * self.sequence_length) if self.sequences else 0.0

    @property
    def truncated_share(self) -> float:
        """Share of the documents that were cut.

        No packing can avoid that for a document longer than a sequence.
        """
        return self.truncated_documents / self.documents if self.documents else 0.0

    def __add__(self, other: PackingStatistics) -> PackingStatistics:
        return PackingStatistics(
            self.sequence_length,
            self.sequences + other.sequences,
            self.tokens + other.tokens,
            self.documents + other.documents,
            self.truncated_documents + other.truncated_documents,
        )


def cut_documents(
    starts: np.ndarray, lengths: np.ndarray, sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return pieces of at most ``sequence_length`` tokens, in the documents' order.

    The two arrays are the pieces' starts and lengths, both int64.
    """
    pieces = -(-lengths // sequence_length)
    ends = np.cumsum(pieces)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - pieces, pieces)
    piece_starts = np.repeat(starts, pieces) + within * sequence_length
    return piece_starts, np.minimum(
        np.repeat(lengths, pieces) - within * sequence_length, sequence_length
    )


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Return the sequence of each piece, and the number of sequences.

    Pieces of one length are alike, and so are sequences with the same free space, so whole groups
    are placed at once: the number of steps grows with ``capacity``, not with that of the pieces.

    Args:
        lengths: int64 [pieces], from 1 to ``capacity``.
        capacity: tokens of a sequence.

    Returns:
        int64 [pieces], and the number of sequences.
    """
    # A stable sort: the packing must be the same on every node, whatever numpy's default is.
    by_length = np.argsort(-lengths, kind="stable")
    sequence_of = np.empty(len(lengths), dtype=np.int64)
    counts = np.bincount(lengths, minlength=capacity + 1)
    # The sequences by their free space, and a bit for each free space that some sequence has.
    by_free: list[deque[np.ndarray]] = [deque() for _ in range(capacity + 1)]
    nonempty = 0
    opened = placed = 0
    for length in range(capacity, 0, -1):
        left = int(counts[length])
        while left:
            # Bit k of ``fitting`` is free space length + k, so its lowest set bit is the best fit.
            fitting = nonempty >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                group = by_free[space].popleft()
            else:
                space = capacity
                group = np.arange(opened, opened - (-left // (capacity // length)))
                opened += len(group)
            # A sequence that takes one such piece has less free space than before: it is the best
            # fit for the next one too.
            each = space // length
            whole = min(left // each, len(group))
            filled = np.repeat(group[:whole], each)
            leftovers = [(space - each * length, group[:whole])]
            rest = min(left - whole * each, each - 1) if whole < len(group) else 0
            if rest:
                filled = np.concatenate([filled, np.repeat(group[whole : whole + 1], rest)])
                leftovers.append((space - rest * length, group[whole : whole + 1]))
            leftovers.append((space, group[whole + (rest > 0) :]))
            sequence_of[by_length[placed : placed + len(filled)]] = filled
            placed += len(filled)
            left -= len(filled)
            for free, sequences in leftovers:
                if len(sequences):
                    (
                        by_free[free].appendleft(sequences)
                        if free == space
                        else by_free[free].append(sequences)
                    )
                    # A Python integer as a bit set: it has ``capacity`` bits, and no search over
                    # lists is needed.
                    nonempty |= 1 << free
            if not by_free[space]:
                nonempty &= ~(1 << space)
    return sequence_of, opened


@dataclass(frozen=True)
class Packing:
    """A packed shard.

    Attributes:
        starts: int64 [pieces], the first token of each piece in the shard, sequence by sequence.
        lengths: int32 [pieces].
        bounds: int64 [sequences + 1]: sequence i holds the pieces bounds[i] .. bounds[i + 1] - 1.
    """

    starts: np.ndarray
    lengths: np.ndarray
    bounds: np.ndarray
    statistics: PackingStatistics


def pack_shard(reader: IndexedReader, sequence_length: int) -> Packing:
    """Pack the documents of a shard; memory grows with their number, about 100 bytes each."""
    starts = reader.document_starts(0, reader.num_tokens)
    document_lengths = np.diff(starts, append=reader.num_tokens)
    piece_starts, lengths = cut_documents(starts, document_lengths, sequence_length)
    sequence_of, sequences = best_fit_decreasing(lengths, sequence_length)
    # Stable again: pieces keep the order in which they were placed in their sequence.
    order = np.argsort(sequence_of, kind="stable")
    bounds = np.zeros(sequences + 1, dtype=np.int64)
    np.cumsum(np.bincount(sequence_of, minlength=sequences), out=bounds[1:])
    truncated = int((document_lengths > sequence_length).sum())
    statistics = PackingStatistics(
        sequence_length, sequences, reader.num_tokens, len(starts), truncated
    )
    return Packing(piece_starts[order], lengths[order].astype(np.int32), bounds, statistics)


class PackedShard:
    """A shard with the packing next to it, of which only the needed entries are read.

    Raises:
        DataError: if there is none, or it is not that of the shard as it is now.
    """

    def __init__(self, shard: Shard, sequence_length: int) -> None:
        self.shard = shard
        self.sequence_length = sequence_length
        path = pack_path(shard.prefix, sequence_length)
        found = read_statistics(shard, sequence_length)
        if found is None:
            raise DataError(
                f"{path} is missing or belongs to other shards: start training with a data folder"
                " that rank 0 of every node can write to"
            )
        self.statistics = found
        self._file = ReadFile(path)
        # The format: the header's size, the header in JSON, then the arrays at the header's
        # offsets.
        header_bytes = int(self._file.read(0, 1, np.dtype("<u8"))[0])
        header = json.loads(self._file.read(8, header_bytes, np.dtype("u1")).tobytes())
        self._places = {
            name: 8 + header_bytes + header[name]["data_offsets"][0]
            for name in ("starts", "lengths", "bounds")
        }

    def __len__(self) -> int:
        return self.statistics.sequences

    def pieces(self, sequence: int) -> list[tuple[int, int]]:
        """Return the pieces of a sequence: (first token in the shard, number of tokens)."""
        first, last = self._read("bounds", sequence, 2, "<i8")
        return list(
            zip(
                self._read("starts", first, last - first, "<i8"),
                self._read("lengths", first, last - first, "<i4"),
                strict=True,
            )
        )

    def _read(self, name: str, first: int, count: int, dtype: str) -> list[int]:
        numbers: list[int] = self._file.read(
            self._places[name] + first * np.dtype(dtype).itemsize, count, np.dtype(dtype)
        ).tolist()
        return numbers


def read_statistics(shard: Shard, sequence_length: int) -> PackingStatistics | None:
    """Return the statistics of the packing next to a shard.

    None if there is none, or it is another shard's.
    """
    try:
        with safe_open(pack_path(shard.prefix, sequence_length), framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    if metadata.get("idx_sha256") != shard.entry.idx_sha256:
        return None
    numbers = [
        int(metadata[name]) for name in ("sequences", "tokens", "documents", "truncated_documents")
    ]
    return PackingStatistics(sequence_length, *numbers)


def pack_stream(
    stream: TokenStream, sequence_length: int, progress: bool = False
) -> PackingStatistics:
    """Pack each shard that is not packed yet, one after the other.

    After a killed run, only the shard that it was packing is packed again.

    Raises:
        StorageError: if the folder cannot be written to.
    """
    total = PackingStatistics(sequence_length, 0, 0, 0, 0)
    for shard in tqdm(stream.shards, desc="packing", unit="shard", disable=not progress):
        statistics = read_statistics(shard, sequence_length)
        if statistics is None:
            packing = pack_shard(shard.open(), sequence_length)
            statistics = packing.statistics
            _save(packing, shard)
        total += statistics
    return total


def _save(packing: Packing, shard: Shard) -> None:
    path = pack_path(shard.prefix, packing.statistics.sequence_length)
    numbers = ("sequences", "tokens", "documents", "truncated_documents")
    metadata = {name: str(getattr(packing.statistics, name)) for name in numbers} | {
        # The packing depends on the documents' lengths only, which are in the index.
        "idx_sha256": shard.entry.idx_sha256
    }
    try:
        write_synced(
            path,
            save(
                {"starts": packing.starts, "lengths": packing.lengths, "bounds": packing.bounds},
                metadata,
            ),
        )
    except OSError as error:
        raise StorageError(
            f"cannot write {path} ({error.strerror}): data.packing.kind=best_fit keeps its index"
            " next to the shards; make the folder writable once, or use"
            " data.packing.kind=concatenate"
        ) from None
