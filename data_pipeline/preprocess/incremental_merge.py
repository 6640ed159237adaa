"""Shards that are written while later units are still being encoded.

Little is left to do after the last unit.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from data_pipeline.preprocess.merge import (
    Piece,
    ShardCutter,
    ShardPlan,
    ShardRecord,
    append_piece,
    keep_record,
)
from data_pipeline.preprocess.unit_record import UnitRecord
from data_pipeline.shards.indexed import IndexedWriter, WrittenShard, bin_path, idx_path
from data_pipeline.shards.split import SPLITS, SplitName
from pretrain.core import faults


class GrowingShards:
    """Writes the first shard of every source and split in a thread, unit by unit in order.

    The thread is the coordinator's.

    The first alone: a corpus that has many is written by all workers at the end, faster than by one
    thread. Parts stay where they are, so that a killed build merges them again.

    Args:
        workspace: the staging folder.
        dtype: of a token.
        max_tokens: of a shard.
    """

    def __init__(self, workspace: Path, dtype: np.dtype[Any], max_tokens: int | None) -> None:
        self.workspace = workspace
        self.dtype = dtype
        self.max_tokens = max_tokens
        # One thread: units have to be appended in their order.
        self._thread = ThreadPoolExecutor(1, "growing shards")
        self._added: deque[Future[None]] = deque()
        self._shards: dict[tuple[SplitName, str], _GrowingShard] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
        # On a full disk closing fails as writing did: the first error is the one to report.
        with suppress(*(OSError,) if kind is not None else ()):
            self._forget()

    @property
    def is_empty(self) -> bool:
        """Whether no unit was added since the beginning, or since all was discarded."""
        return not self._added and not self._shards

    def add(self, record: UnitRecord) -> None:
        """Takes the next unit in order; those of one source follow each other.

        Raises:
            OSError, DataError: that an earlier one met.
        """
        while self._added and self._added[0].done():
            self._added.popleft().result()
        self._added.append(self._thread.submit(self._append, record))

    def _append(self, record: UnitRecord) -> None:
        for (_, source), shard in self._shards.items():
            if source != record.source:
                shard.finish()  # no unit of that source comes any more
        for split in SPLITS:
            if tokens := record.splits[split].tokens:
                key = split, record.source
                if key not in self._shards:
                    self._shards[key] = _GrowingShard(self, split, len(self._shards))
                self._shards[key].add(record.unit, tokens)

    def discard(self) -> None:
        """Forgets all that has grown: the units are encoded anew."""
        for added in self._added:
            added.cancel()
        self._thread.submit(self._forget).result()

    def _forget(self) -> None:
        self._added.clear()
        with ExitStack() as stack:
            for shard in self._shards.values():
                stack.callback(shard.close)
        self._shards.clear()

    def take(self, plan: ShardPlan) -> Future[ShardRecord | None]:
        """Rename a complete shard to its place and return its record.

        The record is None if the shard is not one of those that were written here.

        The result raises what writing it met.
        """
        return self._thread.submit(self._take, plan)

    def _take(self, plan: ShardPlan) -> ShardRecord | None:
        for added in self._added:
            added.result()
        shard = self._shards.get((plan.split, plan.source))
        if shard is None or shard.pieces != plan.pieces:
            return None
        written = shard.finish()
        faults.reached("preprocess.merge")
        place = self.workspace / "shards" / plan.name
        # The .bin before the .idx, as an index must never name tokens that do not exist.
        os.replace(bin_path(shard.prefix), bin_path(place))
        os.replace(idx_path(shard.prefix), idx_path(place))
        return keep_record(plan, written)


class _GrowingShard:
    def __init__(self, shards: GrowingShards, split: SplitName, number: int) -> None:
        self.split = split
        self.workspace = shards.workspace
        self.prefix = shards.workspace / "attempts" / f"growing-{number:05}"
        self.pieces: list[Piece] = []
        self._cutter = ShardCutter(shards.workspace, split, shards.max_tokens)
        self._writer = IndexedWriter(self.prefix, shards.dtype)
        self._written: WrittenShard | None = None

    def add(self, unit: int, tokens: int) -> None:
        if self._written is not None:
            return
        self._cutter.add(unit, tokens)
        for piece in self._cutter.shards[0][len(self.pieces) :]:
            append_piece(self._writer, self.workspace, self.split, piece)
            self.pieces.append(piece)
        if len(self._cutter.shards) > 1:
            self.finish()

    def finish(self) -> WrittenShard:
        """Completes and closes the files; they may be few that a process can hold open."""
        if self._written is None:
            self._written = self._writer.finish()
            self.close()
        return self._written

    def close(self) -> None:
        self._writer.__exit__(None, None, None)
