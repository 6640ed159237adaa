"""Merges the parts of all units to shards, in the order of the input, without duplicates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from data_pipeline.preprocess.worker import MARKS, SIDES, unit_folder
from data_pipeline.preprocess.workspace import no_space_is_told, read_json
from data_pipeline.shards.indexed import (
    IndexedReader,
    IndexedWriter,
    WrittenShard,
    bin_path,
    idx_path,
)
from data_pipeline.shards.manifest import ShardEntry
from data_pipeline.shards.split import SPLITS, SplitName
from pretrain.core import faults


@dataclass(frozen=True)
class Piece:
    """Documents first .. last - 1 of one split's part of a unit; last is None for all."""

    unit: int
    first: int = 0
    last: int | None = None


@dataclass(frozen=True)
class ShardPlan:
    """A shard, and the pieces that its documents come from."""

    name: str
    split: SplitName
    source: str
    pieces: list[Piece]
    dtype: str
    workspace: str


def kept_documents(workspace: Path, unit: int, split: SplitName) -> np.ndarray | None:
    """Return which documents of the part stay: bool [documents]; None if all do."""
    folder = unit_folder(workspace, "units", unit)
    if not (folder / MARKS).exists():
        return None
    mine = np.load(folder / SIDES) == SPLITS.index(split)
    return np.load(folder / MARKS)[mine] == 0


class ShardCutter:
    """Cuts the units of one source and split into shards.

    A shard has as many documents as fit into ``max_tokens``, and at least one.

    Attributes:
        shards: the pieces of each shard so far; all but the last one are complete.
    """

    def __init__(self, workspace: Path, split: SplitName, max_tokens: int | None) -> None:
        self.workspace = workspace
        self.split = split
        self.max_tokens = max_tokens
        self.shards: list[list[Piece]] = []
        self._room = max_tokens

    def add(self, unit: int, tokens: int) -> None:
        """Add the next unit in order, with its tokens before deduplication.

        A unit without tokens is in no shard.
        """
        if not tokens:
            return
        self.shards = self.shards or [[]]
        if self._room is None or tokens <= self._room:
            self.shards[-1].append(Piece(unit))
            self._room = None if self._room is None else self._room - tokens
            return
        assert self.max_tokens is not None
        ends = np.cumsum(
            IndexedReader(unit_folder(self.workspace, "units", unit) / self.split).sequence_lengths,
            dtype=np.int64,
        )
        first = 0
        while first < len(ends):
            before = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, before + self._room, side="right"))
            # Without this the loop would never end.
            if last == first and not self.shards[-1]:
                # A document that is larger than a shard has one to itself.
                last += 1
            if last > first:
                self.shards[-1].append(Piece(unit, first, last))
                self._room -= int(ends[last - 1]) - before
            if last < len(ends):
                self.shards.append([])
                self._room = self.max_tokens
            first = last


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: its split, and its entry in the manifest."""

    split: SplitName
    entry: ShardEntry

    def to_json(self) -> str:
        """Return the JSON of the record's file: the entry's fields behind the split."""
        return json.dumps({"split": self.split, **self.entry.model_dump()})

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read the record of a finished shard; None if there is no complete one."""
        content = read_json(path)
        if content is None:
            return None
        split = content.pop("split")
        return cls(split, ShardEntry(**content))


def write_shard(plan: ShardPlan) -> ShardRecord:
    """Write one shard and its record; a finished one is found again."""
    workspace = Path(plan.workspace)
    prefix = workspace / "shards" / plan.name
    record = prefix.with_name(plan.name + ".json")
    found = ShardRecord.read(record)
    if found is not None and bin_path(prefix).exists() and idx_path(prefix).exists():
        return found
    for path in (bin_path(prefix), idx_path(prefix)):
        path.unlink(missing_ok=True)
    with no_space_is_told(workspace), IndexedWriter(prefix, np.dtype(plan.dtype)) as writer:
        faults.reached("preprocess.merge")
        for piece in plan.pieces:
            append_piece(writer, workspace, plan.split, piece)
        return keep_record(plan, writer.finish())


def append_piece(writer: IndexedWriter, workspace: Path, split: SplitName, piece: Piece) -> None:
    """Copy the documents of a piece that stay to the end of a shard."""
    reader = IndexedReader(unit_folder(workspace, "units", piece.unit) / split)
    kept = kept_documents(workspace, piece.unit, split)
    for first, last in _runs(kept, piece.first, len(reader) if piece.last is None else piece.last):
        writer.copy(reader, first, last)


def keep_record(plan: ShardPlan, written: WrittenShard) -> ShardRecord:
    """Write the record of a finished shard: once it is on disk, the shard is not written again."""
    record = ShardRecord(plan.split, ShardEntry.of(written, plan.name, plan.source))
    path = Path(plan.workspace) / "shards" / f"{plan.name}.json"
    path.write_text(record.to_json(), encoding="utf-8")
    return record


def _runs(kept: np.ndarray | None, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of kept documents in first .. last - 1."""
    if kept is None:
        yield first, last
        return
    # Padded with False at both ends, every run of kept documents has a rising and a falling edge;
    # np.diff needs a signed type to show them.
    edges = (
        np.flatnonzero(
            np.diff(np.concatenate([[False], kept[first:last], [False]]).astype(np.int8))
        )
        + first
    )
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
