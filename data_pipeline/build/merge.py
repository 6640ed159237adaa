"""From the parts of all units to the shards, in the order of the input, without what deduplication removed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.build.worker import MARKS, SIDES, unit_folder
from data_pipeline.build.workspace import no_space_is_told, read_json
from data_pipeline.indexed import IndexedReader, IndexedWriter, bin_path, idx_path
from data_pipeline.manifest import ShardEntry
from data_pipeline.split import SPLITS, SplitName


@dataclass(frozen=True)
class Piece:
    """Documents first .. last - 1 of one split's part of a unit; last is None for all."""

    unit: int
    first: int = 0
    last: int | None = None


@dataclass(frozen=True)
class ShardPlan:
    """A shard and where its documents come from."""

    name: str
    split: SplitName
    source: str
    pieces: list[Piece]
    dtype: str
    workspace: str


def kept_documents(workspace: Path, unit: int, split: SplitName) -> np.ndarray | None:
    """bool [documents of the part]: which ones stay; None where all do."""
    folder = unit_folder(workspace, "units", unit)
    if not (folder / MARKS).exists():
        return None
    mine = np.load(folder / SIDES) == SPLITS.index(split)
    return np.load(folder / MARKS)[mine] == 0


def cut_into_shards(workspace: Path, units: list[tuple[int, int]], split: SplitName, max_tokens: int | None) -> list[list[Piece]]:
    """Which pieces make up each shard: as many documents as fit into ``max_tokens``, and one at least.

    Args:
        units: (number, tokens) of each unit that has documents, in order; tokens before deduplication.
    """
    shards: list[list[Piece]] = [[]]
    room = max_tokens
    for unit, tokens in units:
        if room is None or tokens <= room:
            shards[-1].append(Piece(unit))
            room = None if room is None else room - tokens
            continue
        assert max_tokens is not None
        ends = np.cumsum(IndexedReader(unit_folder(workspace, "units", unit) / split).sequence_lengths, dtype=np.int64)
        first = 0
        while first < len(ends):
            before = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, before + room, side="right"))
            if last == first and not shards[-1]:
                last += 1  # a document that is larger than a shard has one to itself
            if last > first:
                shards[-1].append(Piece(unit, first, last))
                room -= int(ends[last - 1]) - before
            if last < len(ends):
                shards.append([])
                room = max_tokens
            first = last
    return [shard for shard in shards if shard]


def write_shard(plan: ShardPlan) -> dict[str, Any]:
    """Writes one shard and the record of it; a finished one is found again."""
    workspace = Path(plan.workspace)
    prefix = workspace / "shards" / plan.name
    record = prefix.with_name(plan.name + ".json")
    found = read_json(record)
    if found is not None and bin_path(prefix).exists() and idx_path(prefix).exists():
        return found
    for path in (bin_path(prefix), idx_path(prefix)):
        path.unlink(missing_ok=True)
    with no_space_is_told(workspace), ExitStack() as stack:
        writer = stack.enter_context(IndexedWriter(prefix, np.dtype(plan.dtype)))
        for piece in plan.pieces:
            reader = IndexedReader(unit_folder(workspace, "units", piece.unit) / plan.split)
            kept = kept_documents(workspace, piece.unit, plan.split)
            for first, last in _runs(kept, piece.first, len(reader) if piece.last is None else piece.last):
                writer.copy(reader, first, last)
        result = {"split": plan.split, **ShardEntry.of(writer.finish(), plan.name, plan.source).model_dump()}
        record.write_text(json.dumps(result), encoding="utf-8")
        return result


def _runs(kept: np.ndarray | None, first: int, last: int) -> Iterator[tuple[int, int]]:
    """The stretches of kept documents in first .. last - 1."""
    if kept is None:
        yield first, last
        return
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept[first:last], [False]]).astype(np.int8))) + first
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
