"""Compares blocks of the shards' files with the manifest when training starts.

``sample`` reads one block of every file, other ones at each start, in the background of the first
steps; ``full`` reads everything before them. The work is split over the ranks, so each may find
what the others do
not: training has them agree (``pretrain/training/stopping.py``).
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.shards.block_checksums import block_checksum, num_blocks
from data_pipeline.shards.indexed import bin_path, idx_path
from data_pipeline.shards.manifest import Manifest, ShardEntry
from pretrain.core.progress import Stage

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 20
# The least share of a processor that the system gives: what training leaves over.
LOWEST_PRIORITY = 19
SHA256_DIGITS = 64


@dataclass(frozen=True)
class Block:
    """Bytes start .. start + size - 1 of a file, and their checksum in the manifest.

    It is XXH3, or SHA-256 for a file that has no other.
    """

    path: Path
    number: int
    of: int
    start: int
    size: int
    checksum: str

    def fault(
        self,
        advance: Callable[[int], object] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> str | None:
        """Return what is wrong with the block on disk, in a sentence; None if nothing is.

        Args:
            advance: is called with the number of bytes that were read.
            stop: asked between reads; once it is true the rest is let pass.
        """
        checksum: Any = hashlib.sha256() if self.is_whole_file else block_checksum()
        left = self.size
        buffer = memoryview(bytearray(READ_BYTES))
        try:
            with self.path.open("rb", buffering=0) as stream:
                stream.seek(self.start)
                while left and (count := stream.readinto(buffer[: min(left, READ_BYTES)])):
                    checksum.update(buffer[:count])
                    left -= count
                    advance(count)
                    if stop():
                        return None
        except OSError as error:
            return (
                f"{self.place} cannot be read: {error.strerror}; look at the storage that it is on,"
                " or build the data again"
            )
        if left:
            return (
                f"{self.place} ends {left:,} bytes too early: build the data again with"
                " tools/preprocess_data.py --fresh"
            )
        if checksum.hexdigest() == self.checksum:
            return None
        return (
            f"{self.place} has changed since it was written (its checksum is not that of the"
            " manifest): copy the file again from where it is whole, or build the data again with"
            " tools/preprocess_data.py --fresh; tools/verify_data.py lists all that is damaged"
        )

    @property
    def is_whole_file(self) -> bool:
        """Whether the manifest has no checksums of blocks, but the file's SHA-256."""
        return len(self.checksum) == SHA256_DIGITS

    @property
    def place(self) -> str:
        """File, block and bytes, for sentences."""
        return (
            f"{self.path}, block {self.number} of {self.of} (bytes {self.start:,} to"
            f" {self.start + self.size - 1:,}),"
        )


def every_block(manifests: Iterable[Manifest]) -> list[Block]:
    """Return all blocks of all files.

    A file without checksums of blocks is one block, with its SHA-256.
    """
    return [block for files in _files(manifests) for block in files]


def sampled_blocks(manifests: Sequence[Manifest], source: random.Random) -> list[Block]:
    """A random block of every file that has checksums of blocks."""
    return [source.choice(blocks) for blocks in _files(manifests) if not blocks[0].is_whole_file]


def lacks_blocks(manifests: Iterable[Manifest]) -> Manifest | None:
    """The first manifest that was written before blocks had checksums."""
    return next(
        (
            manifest
            for manifest in manifests
            if any(shard.block_bytes is None for shard in _shards(manifest))
        ),
        None,
    )


def _shards(manifest: Manifest) -> list[ShardEntry]:
    return [shard for split in manifest.splits.values() for shard in split.shards]


def _files(manifests: Iterable[Manifest]) -> list[list[Block]]:
    """Return the blocks of each file that is not empty, those of all .bin files first.

    So ranks that share them have the same amount to read.
    """
    shards = [
        (manifest.folder / shard.prefix, shard)
        for manifest in manifests
        for shard in _shards(manifest)
    ]
    files = [
        _blocks(
            bin_path(prefix), shard.bin_bytes, shard.block_bytes, shard.bin_blocks, shard.bin_sha256
        )
        for prefix, shard in shards
    ]
    files += [
        _blocks(
            idx_path(prefix), shard.idx_bytes, shard.block_bytes, shard.idx_blocks, shard.idx_sha256
        )
        for prefix, shard in shards
    ]
    return [blocks for blocks in files if blocks]


def _blocks(
    path: Path, size: int, block_bytes: int | None, checksums: list[str], sha256: str
) -> list[Block]:
    if not size:
        return []
    if block_bytes is None:
        return [Block(path, 0, 1, 0, size, sha256)]
    starts = range(0, size, block_bytes)
    of = num_blocks(size, block_bytes)
    return [
        Block(path, number, of, start, min(block_bytes, size - start), checksums[number])
        for number, start in enumerate(starts)
    ]


def first_fault(blocks: Sequence[Block], progress: bool) -> str | None:
    """Reads blocks one after the other, with a bar on standard error, up to the first fault."""
    total = sum(block.size for block in blocks)
    with Stage("verifying data", progress, total, "B") as stage:
        return next((fault for block in blocks if (fault := block.fault(stage.advance))), None)


class BackgroundCheck:
    """Reads blocks in a thread of the lowest priority, up to the first fault.

    Attributes:
        fault: what was found so far.
    """

    def __init__(self, blocks: Sequence[Block], fault: str | None = None) -> None:
        self.fault = fault
        self._blocks = blocks
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="data-check", daemon=True)
        self._thread.start()

    def finish(self, give_up: bool = False) -> str | None:
        """Waits for the end, and returns the fault that was found.

        ``give_up`` leaves the rest unread.
        """
        if give_up:
            self._given_up.set()
        self._thread.join()
        return self.fault

    def _run(self) -> None:
        with suppress(OSError):  # on Linux a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        for block in self._blocks:
            fault = block.fault(stop=self._given_up.is_set)
            if self._given_up.is_set():
                logger.info("the check of the data was left unfinished: the run was asked to stop")
                return
            if fault is not None:
                self.fault = fault
                return
        if self._blocks:
            logger.info(
                "%d blocks of the data, %d bytes, are as they were written",
                len(self._blocks),
                sum(block.size for block in self._blocks),
            )
