"""Finds the duplicates among a corpus' documents, from keys on disk, in bounded memory.

Of documents with equal digests the first in corpus order stays. Of the others, those that share a
band hash are linked, and the first of each connected component stays. Corpus order is the order of
the units, and of the rows inside each.

Equal keys are found in two steps: inside chunks of rows, and then, among the first of each kind in
its chunk, inside partitions of the key's range that are on disk. The result depends on neither.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

KEEP = 0
EXACT_DUPLICATE = 1
NEAR_DUPLICATE = 2
# About how many bytes sorting needs for each key: itself, its copy in order, the order, and what
# compares neighbours.
BYTES_PER_KEY = 80

Rows = NDArray[np.int64]
Marks = NDArray[np.uint8]
Progress = Callable[[int, int], None]
Join = Callable[[Rows, Rows], None]


@dataclass(frozen=True)
class UnitKeys:
    """The keys of one unit's documents, row by row, as .npy files.

    Attributes:
        digests: uint64 [n, 2], a hash of the content.
        bands: uint64 [n, bands], as :func:`data_pipeline.cleaning.near_duplicates.minhash_bands`
            gives them; None without near duplicates.
        marks: where the result goes: uint8 [n], 0 keep, 1 exact duplicate, 2 near duplicate.
    """

    digests: Path
    bands: Path | None
    marks: Path


def mark_duplicates(
    keys: Sequence[UnitKeys],
    scratch: Path,
    exact: bool,
    near: bool,
    memory_bytes: int = 256 << 20,
    progress: Progress | None = None,
) -> None:
    """Write the marks of every unit, each file at once or not at all.

    Memory stays near ``memory_bytes`` however many documents there are. Scratch takes 9 bytes a
    document, and if the keys of one kind do not fit into the memory, 24 bytes a digest or 16
    bytes a band.

    Args:
        scratch: a folder for temporary files; what an earlier run left there is removed.
        progress: called with the rows done and the rows in all, each counted once a step.
    """
    work = scratch / "duplicates"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    counts = [len(_map(unit.digests)) for unit in keys]
    total = sum(counts)
    steps = 1 + exact + near
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        if progress:
            progress(done, total * steps)

    # A map of no bytes is not allowed.
    marks: Marks = np.memmap(work / "marks", np.uint8, "w+", shape=max(total, 1))
    # A union-find forest: each row points to a row that it is a duplicate of, at first to itself.
    parents: Rows = np.memmap(work / "parents", np.int64, "w+", shape=max(total, 1))
    for start, stop in _slices(total, memory_bytes):
        parents[start:stop] = np.arange(start, stop)
    if exact:
        _mark_exact([unit.digests for unit in keys], marks, work / "digests", memory_bytes, advance)
    if near:
        paths = [unit.bands for unit in keys if unit.bands is not None]
        assert len(paths) == len(keys), (
            "near duplicates are found by bands, which every unit must have"
        )
        _link_near(paths, marks, parents, work / "bands", memory_bytes, advance)
    start = 0
    for unit, count in zip(keys, counts, strict=True):
        _write(unit.marks, marks, parents, range(start, start + count), memory_bytes)
        start += count
        advance(count)
    del marks, parents
    shutil.rmtree(work)


def _map(path: Path) -> NDArray[np.uint64]:
    return np.load(path, mmap_mode="r")


def _slices(total: int, memory_bytes: int) -> Iterator[tuple[int, int]]:
    size = max(memory_bytes // BYTES_PER_KEY, 1)
    for start in range(0, total, size):
        yield start, min(start + size, total)


def _mark_exact(
    paths: Sequence[Path],
    marks: Marks,
    work: Path,
    memory_bytes: int,
    advance: Callable[[int], object],
) -> None:
    def join(firsts: Rows, others: Rows) -> None:
        marks[others] = EXACT_DUPLICATE

    _join_equal(_read_chunks(paths, 1, memory_bytes, advance), len(marks), work, memory_bytes, join)


def _link_near(
    paths: Sequence[Path],
    marks: Marks,
    parents: Rows,
    work: Path,
    memory_bytes: int,
    advance: Callable[[int], object],
) -> None:
    width = _map(paths[0]).shape[1] if paths else 1

    def chunks() -> Iterator[tuple[NDArray[np.uint64], Rows]]:
        for bands, rows in _read_chunks(paths, width, memory_bytes, advance):
            stays = marks[rows] == KEEP
            yield bands[stays].reshape(-1, 1), np.repeat(rows[stays], width)

    def join(firsts: Rows, others: Rows) -> None:
        _link(parents, firsts, others)

    _join_equal(chunks(), len(marks) * width, work, memory_bytes, join)


def _read_chunks(
    paths: Sequence[Path], keys_per_row: int, memory_bytes: int, advance: Callable[[int], object]
) -> Iterator[tuple[NDArray[np.uint64], Rows]]:
    """Yield the rows of all files with their numbers, in chunks that the memory allows.

    A chunk may reach across the ends of files.
    """
    limit = max(memory_bytes // (BYTES_PER_KEY * keys_per_row), 1)
    pieces: list[NDArray[np.uint64]] = []
    held = first = 0
    for path in paths:
        mapped = _map(path)
        start = 0
        while start < len(mapped):
            stop = min(start + limit - held, len(mapped))
            pieces.append(np.array(mapped[start:stop]))
            held += stop - start
            start = stop
            if held == limit:
                yield np.concatenate(pieces), np.arange(first, first + held)
                # After the yield: the chunk has been joined when the consumer asks for the next
                # one.
                advance(held)
                first = first + held
                held = 0
                pieces = []
    if held:
        yield np.concatenate(pieces), np.arange(first, first + held)
        advance(held)


def _join_equal(
    chunks: Iterator[tuple[NDArray[np.uint64], Rows]],
    total: int,
    work: Path,
    memory_bytes: int,
    join: Join,
) -> None:
    """Call ``join`` so that all rows of a key become connected.

    Its arguments are the first rows with a key, and later rows with the same key.

    Args:
        chunks: keys [n, columns] and the row of each, ascending over all chunks.
        total: keys in all chunks, or more.
        work: a folder to make, for the partitions.
    """
    work.mkdir()
    # Rounded up; keys are hashes, so ranges of equal width hold about equally many.
    partitions = -(-total * BYTES_PER_KEY // memory_bytes)
    columns = 0
    for keys, rows in chunks:
        kept = _join_within(keys, rows, join)
        columns = keys.shape[1]
        if partitions > 1:
            _scatter(keys[kept], rows[kept], partitions, work)
    # One partition means one chunk, which has found everything.
    # Sorted, because a directory lists its files in any order and the marks must not depend on it.
    for path in sorted(work.iterdir()):
        records = np.fromfile(path, np.uint64).reshape(-1, columns + 1)
        _join_within(records[:, :columns], records[:, columns].astype(np.int64), join)
        path.unlink()


def _join_within(keys: NDArray[np.uint64], rows: Rows, join: Join) -> NDArray[np.intp]:
    """Join the rows of equal keys within a chunk.

    Returns the places of the first row of each key, in the order of the keys' first column.
    """
    order = keys[:, 0].argsort()
    first_column = keys[order, 0]
    again = np.zeros(len(keys) + 1, bool)
    np.equal(first_column[1:], first_column[:-1], out=again[1:-1])
    # Most keys are alone; only the others are sorted by all columns, and by row.
    shared = np.flatnonzero(again[1:] | again[:-1])
    if not shared.size:
        return order
    places = order[shared]
    places = places[np.lexsort((rows[places], *keys[places].T[::-1]))]
    order[shared] = places
    is_first = np.ones(len(places), bool)
    is_first[1:] = (keys[places[1:]] != keys[places[:-1]]).any(axis=1)
    group = np.cumsum(is_first) - 1
    join(rows[places[is_first]][group[~is_first]], rows[places[~is_first]])
    return np.delete(order, shared[~is_first])


def _scatter(keys: NDArray[np.uint64], rows: Rows, partitions: int, work: Path) -> None:
    """Append sorted keys and their rows to the files of the ranges that they fall into."""
    records = np.column_stack([keys, rows.astype(np.uint64)])
    starts = np.arange(partitions, dtype=np.uint64) * np.uint64(-(-(1 << 64) // partitions))
    cuts = np.append(np.searchsorted(keys[:, 0], starts), len(keys))
    for number in np.flatnonzero(np.diff(cuts)).tolist():
        with open(work / f"{number:08}", "ab") as file:
            records[cuts[number] : cuts[number + 1]].tofile(file)


def _link(parents: Rows, left: Rows, right: Rows) -> None:
    """Connect pairs of rows.

    A parent is never larger than its child, so the root of a component is its first row.
    """
    while left.size:
        left, right = _roots(parents, left), _roots(parents, right)
        apart = left != right
        left, right = left[apart], right[apart]
        # Of several links of one root only the least can be made now; the others are looked at
        # again, from their new roots.
        np.minimum.at(parents, np.maximum(left, right), np.minimum(left, right))


def _roots(parents: Rows, rows: Rows) -> Rows:
    """Return the root of each row; the rows' paths are halved until they point at it."""
    while True:
        above = parents[rows]
        top = parents[above]
        if np.array_equal(above, top):
            return above
        parents[rows] = top


def _write(path: Path, marks: Marks, parents: Rows, rows: range, memory_bytes: int) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (len(rows),)}
        )
        for start, stop in _slices(len(rows), memory_bytes):
            part = slice(rows.start + start, rows.start + stop)
            result = np.array(marks[part])
            result[(result == KEEP) & (parents[part] != np.arange(part.start, part.stop))] = (
                NEAR_DUPLICATE
            )
            file.write(result.tobytes())
        file.flush()
        os.fsync(file.fileno())
    # Synced before the rename, so that a file of this name is always complete.
    os.replace(temporary, path)
