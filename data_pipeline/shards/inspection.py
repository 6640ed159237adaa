"""Looks into built data: documents, lengths, duplicates, and agreement with the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline.shards.indexed import IndexedReader, bin_path, idx_path
from data_pipeline.shards.manifest import Manifest, ShardEntry, check_file
from data_pipeline.shards.split import SplitName
from data_pipeline.shards.verification import every_block
from pretrain.core.errors import DataError

BLOCK = 1 << 21
Advance = Callable[[int], object]


def open_shards(manifest: Manifest, split: SplitName) -> Iterator[tuple[ShardEntry, IndexedReader]]:
    """The shards of a split, in order.

    Raises:
        DataError: if the data has no such split, or a shard is damaged.
    """
    if split not in manifest.splits:
        raise DataError(
            f"the data in {manifest.folder} has no {split} split: choose one of"
            f" {', '.join(manifest.splits)} with --split"
        )
    for entry in manifest.splits[split].shards:
        yield entry, IndexedReader(manifest.folder / entry.prefix)


@dataclass(frozen=True)
class Found:
    """One document: its number in the split, its source, and its token ids [n]."""

    number: int
    source: str
    tokens: np.ndarray


def documents(manifest: Manifest, split: SplitName, numbers: list[int]) -> Iterator[Found]:
    """The documents with these numbers, in the order of the split.

    Raises:
        DataError: for a number that the split does not have.
    """
    wanted = sorted(set(numbers))
    first = 0
    for entry, reader in open_shards(manifest, split):
        while wanted and wanted[0] < first + len(reader):
            yield Found(wanted[0], entry.source, reader[wanted[0] - first])
            wanted.pop(0)
        first += len(reader)
    if wanted:
        raise DataError(
            f"there is no document {wanted[0]}: the {split} split has {first:,}, numbered from 0"
        )


def lengths(manifest: Manifest, split: SplitName) -> Iterator[np.ndarray]:
    """Lengths of all documents in tokens, int32, in blocks."""
    for _, reader in open_shards(manifest, split):
        for start in range(0, len(reader), BLOCK):
            yield reader.sequence_lengths[start : start + BLOCK]


@dataclass(frozen=True)
class LengthStatistics:
    """Lengths of documents in tokens, as a histogram and percentiles.

    ``edges`` [bins + 1] are powers of two, ``counts`` [bins] the documents between them.
    """

    documents: int
    mean: float
    longest: int
    percentiles: dict[int, int]
    edges: list[int]
    counts: list[int]


def length_statistics(manifest: Manifest, split: SplitName) -> LengthStatistics:
    """Return statistics of the lengths of a split's documents.

    Memory does not grow: percentiles come from counts by length.
    """
    # Documents of each length; the last counts all longer ones.
    by_length = np.zeros(1 << 16, dtype=np.int64)
    counts = np.zeros(33, dtype=np.int64)
    total = tokens = longest = 0
    for block in lengths(manifest, split):
        by_length += np.bincount(np.minimum(block, len(by_length) - 1), minlength=len(by_length))
        counts += np.bincount(np.ceil(np.log2(np.maximum(block, 1))).astype(np.int64), minlength=33)
        total = total + len(block)
        tokens = tokens + int(block.sum(dtype=np.int64))
        longest = max(longest, int(block.max(initial=0)))
    cumulative = np.cumsum(by_length)
    at = (
        {
            share: int(np.searchsorted(cumulative, share / 100 * total))
            for share in (5, 25, 50, 75, 95)
        }
        if total
        else {}
    )
    used = slice(0, int(np.flatnonzero(counts).max(initial=0)) + 1)
    edges = [0] + [1 << power for power in range(len(counts[used]))]
    percentiles = {
        share: longest if length == len(by_length) - 1 else length for share, length in at.items()
    }
    return LengthStatistics(
        total, tokens / total if total else 0.0, longest, percentiles, edges, counts[used].tolist()
    )


@dataclass(frozen=True)
class Duplicates:
    """``repeated`` documents equal an earlier one.

    ``most`` are the numbers and copies of the most repeated.
    """

    documents: int
    repeated: int
    repeated_tokens: int
    most: list[tuple[int, int]]


def find_duplicates(
    manifest: Manifest, split: SplitName, most: int, advance: Advance
) -> Duplicates:
    """Documents with equal tokens. Takes 16 bytes of memory a document.

    Args:
        most: how many of the most repeated documents to name.
        advance: is called with the number of tokens read.
    """
    digests = []
    sizes = []
    for _, reader in open_shards(manifest, split):
        block = np.empty(len(reader), dtype=np.uint64)
        for index in range(len(reader)):
            block[index] = xxhash.xxh3_64_intdigest(reader[index].tobytes())
            advance(int(reader.sequence_lengths[index]))
        digests.append(block)
        sizes.append(np.array(reader.sequence_lengths, dtype=np.int64))
    every = np.concatenate([np.zeros(0, np.uint64), *digests])
    size = np.concatenate([np.zeros(0, np.int64), *sizes])
    _, first, copies = np.unique(every, return_index=True, return_counts=True)
    top = np.argsort(-copies, kind="stable")[:most]
    return Duplicates(
        documents=len(every),
        repeated=int((copies - 1).sum()),
        repeated_tokens=int(((copies - 1) * size[first]).sum()),
        most=[(int(first[place]), int(copies[place])) for place in top if copies[place] > 1],
    )


def check_everything(manifest: Manifest, advance: Advance) -> list[str]:
    """Everything that is wrong with a data folder, one sentence each; empty if it is whole.

    Checks every checksum and size, those of blocks too, each index against its tokens, every token
    id against the vocabulary, the end-of-document tokens, and the manifest's totals.
    """
    remedy = "build the data again with tools/preprocess_data.py --fresh"
    put_back = "put back the tokenizer that the shards were built with"
    checks: list[Callable[[], None]] = [
        partial(check_file, manifest.tokenizer_path, None, manifest.tokenizer.sha256, put_back)
    ]
    for split in manifest.splits.values():
        for shard in split.shards:
            prefix = manifest.folder / shard.prefix
            checks.append(
                partial(check_file, idx_path(prefix), shard.idx_bytes, shard.idx_sha256, remedy)
            )
            checks.append(
                partial(check_file, bin_path(prefix), shard.bin_bytes, shard.bin_sha256, remedy)
            )
            checks.append(partial(_check_shard, prefix, shard, manifest, advance))
    faults = [fault for check in checks if (fault := _fault_of(check))]
    # Where in a file the damage is; and training looks at these checksums.
    faults += [
        fault
        for block in every_block([manifest])
        if not block.is_whole_file and (fault := block.fault())
    ]
    for name, split in manifest.splits.items():
        for what in ("documents", "tokens"):
            counted = sum(getattr(shard, what) for shard in split.shards)
            if counted != getattr(split, what):
                faults.append(
                    f"the manifest counts {getattr(split, what):,} {what} in the {name} split, its"
                    f" shards {counted:,}: {remedy}"
                )
    return faults


def _fault_of(check: Callable[[], None]) -> str | None:
    try:
        check()
    except DataError as error:
        return str(error)
    return None


def _check_shard(prefix: Path, shard: ShardEntry, manifest: Manifest, advance: Advance) -> None:
    """Compares a shard's content with the manifest.

    Raises:
        DataError: for the first thing that is wrong.
    """
    reader = IndexedReader(prefix)
    reader.check()
    if (len(reader), reader.num_tokens, reader.dtype.name) != (
        shard.documents,
        shard.tokens,
        manifest.dtype,
    ):
        found = f"{len(reader):,} documents and {reader.num_tokens:,} tokens of {reader.dtype.name}"
        raise DataError(
            f"{bin_path(prefix)} holds {found}, its manifest says {shard.documents:,} and"
            f" {shard.tokens:,} of {manifest.dtype}"
        )
    for start in range(0, reader.num_tokens, BLOCK):
        block = reader.tokens[start : start + BLOCK]
        if block.max() >= manifest.tokenizer.vocab_size or block.min() < 0:
            place = start + int(((block >= manifest.tokenizer.vocab_size) | (block < 0)).argmax())
            raise DataError(
                f"{bin_path(prefix)} holds the token id {reader.tokens[place]} at token {place},"
                f" but the tokenizer has {manifest.tokenizer.vocab_size} entries"
            )
        advance(len(block))
    end = 0
    for start in range(0, len(reader) if manifest.tokenizer.append_eod else 0, BLOCK):
        ends = end + np.cumsum(reader.sequence_lengths[start : start + BLOCK], dtype=np.int64)
        wrong = reader.tokens[ends - 1] != manifest.tokenizer.eod_id
        if wrong.any():
            raise DataError(
                f"document {start + int(wrong.argmax())} of {bin_path(prefix)} does not end with"
                " the end-of-document token"
            )
        end = int(ends[-1])
