"""Checksums of a file in blocks.

Part of a file of any size can be compared with its manifest, and damage has a position.
"""

from __future__ import annotations

import hashlib
from typing import Any

import xxhash

# 64 blocks for a shard of 4 GiB: about 2 KB of a manifest, and half a second of reading from one
# disk.
BLOCK_BYTES = 64 << 20


def block_checksum(content: Any = b"") -> xxhash.xxh3_128:
    """XXH3 (128 bits) of a block's bytes, which may come in parts."""
    return xxhash.xxh3_128(content)


def num_blocks(size: int, block_bytes: int) -> int:
    """Blocks of a file of ``size`` bytes; an empty file has none."""
    return -(-size // block_bytes)


class FileChecksums:
    """SHA-256 of a whole file and the checksum of each of its blocks, from its bytes in order."""

    def __init__(self) -> None:
        self._whole = hashlib.sha256()
        self._blocks: list[str] = []
        self._block, self._room = block_checksum(), BLOCK_BYTES

    def update(self, content: Any) -> None:
        """Takes the next bytes: any contiguous buffer."""
        view = memoryview(content)
        if not view.nbytes:
            return
        view = view.cast("B")
        self._whole.update(view)
        while len(view) >= self._room:
            self._block.update(view[: self._room])
            self._blocks.append(self._block.hexdigest())
            view = view[self._room :]
            self._block = block_checksum()
            self._room = BLOCK_BYTES
        self._block.update(view)
        self._room -= len(view)

    def hexdigest(self) -> str:
        """SHA-256 of all bytes so far."""
        return self._whole.hexdigest()

    def blocks(self) -> list[str]:
        """The blocks' checksums, that of a shorter last one included."""
        return (
            [*self._blocks, self._block.hexdigest()]
            if self._room < BLOCK_BYTES
            else list(self._blocks)
        )
