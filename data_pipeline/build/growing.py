"""Shards that grow while later units are still being encoded: what is left to do after the last unit is little."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from data_pipeline.build.merge import Piece, ShardCutter, ShardPlan, append_piece, keep_record
from data_pipeline.indexed import IndexedWriter, WrittenShard, bin_path, idx_path
from data_pipeline.split import SPLITS, SplitName


class GrowingShards:
    """Writes the first shard of every source and split in a thread of the coordinator, unit by unit in their order.

    The first alone: a corpus that has many is written by all workers at the end, faster than by one thread. Parts stay where they are, so that
    a killed build merges them again.

    Args:
        workspace: the staging folder.
        max_tokens: of a shard.
    """

    def __init__(self, workspace: Path, dtype: np.dtype[Any], max_tokens: int | None) -> None:
        self.workspace, self.dtype, self.max_tokens = workspace, dtype, max_tokens
        self._thread = ThreadPoolExecutor(1, "growing shards")
        self._added: deque[Future[None]] = deque()
        self._shards: dict[tuple[SplitName, str], _GrowingShard] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._forget()

    def add(self, record: dict[str, Any]) -> None:
        """Takes the next unit in order.

        Raises:
            OSError: that writing an earlier one met.
        """
        while self._added and self._added[0].done():
            self._added.popleft().result()
        self._added.append(self._thread.submit(self._append, record))

    def _append(self, record: dict[str, Any]) -> None:
        for split in SPLITS:
            key = split, record["source"]
            if key not in self._shards:
                self._shards[key] = _GrowingShard(self, split, len(self._shards))
            self._shards[key].add(record["unit"], record["splits"][split]["tokens"])

    def discard(self) -> None:
        """Forgets all that has grown: the units are encoded anew."""
        self._thread.submit(self._forget).result()

    def _forget(self) -> None:
        self._added.clear()
        for shard in self._shards.values():
            shard.close()
        self._shards.clear()

    def take(self, plan: ShardPlan) -> dict[str, Any] | None:
        """Gives a shard its place and returns its record; None where it is none of those that have grown here.

        Raises:
            OSError: that writing it met.
        """
        for added in self._added:
            added.result()
        shard = self._shards.get((plan.split, plan.source))
        if shard is None or shard.pieces != plan.pieces:
            return None
        written = shard.finish()
        place = self.workspace / "shards" / plan.name
        os.replace(bin_path(shard.prefix), bin_path(place))
        os.replace(idx_path(shard.prefix), idx_path(place))
        return keep_record(plan, written)


class _GrowingShard:
    def __init__(self, shards: GrowingShards, split: SplitName, number: int) -> None:
        self.split, self.workspace = split, shards.workspace
        self.prefix = shards.workspace / "attempts" / f"growing-{number:05}"
        self.pieces: list[Piece] = []
        self._cutter = ShardCutter(shards.workspace, split, shards.max_tokens)
        self._writer = IndexedWriter(self.prefix, shards.dtype)

    def add(self, unit: int, tokens: int) -> None:
        if len(self._cutter.shards) > 1:
            return
        self._cutter.add(unit, tokens)
        first = self._cutter.shards[0] if self._cutter.shards else []
        for piece in first[len(self.pieces) :]:
            append_piece(self._writer, self.workspace, self.split, piece)
            self.pieces.append(piece)

    def finish(self) -> WrittenShard:
        return self._writer.finish()

    def close(self) -> None:
        self._writer.__exit__(None, None, None)
