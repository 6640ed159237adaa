"""Indices in files next to the shards: built by one process, memory-mapped by all.

The files have the format that Megatron writes into its own cache, with names of ours: Megatron's
contain a hash of its tokenizer object and of the paths of its command line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline.shards.manifest import canonical_sha256
from pretrain.core.files import fsync_path, named_in_errors, write_synced

# Version of the files: another one is built again.
VERSION = 1
FOLDER = "megatron_order"


@dataclass(frozen=True)
class IndexFiles:
    """Arrays in one folder: ``KEY-KIND-train-NAME.npy``, and a description that is written last.

    Attributes:
        folder: may be missing until something is saved.
        kind: the class of Megatron that they belong to.
        identity: all that the arrays follow from; its checksum is KEY.
        expected: type and shape of each array by its name.
    """

    folder: Path
    kind: str
    identity: Mapping[str, object]
    expected: Mapping[str, tuple[np.dtype[np.generic], tuple[int, ...]]]

    def path(self, name: str) -> Path:
        """Return the path of an array, or of the description."""
        key = canonical_sha256({"version": VERSION, **self.identity})[:32]
        return self.folder / f"{key}-{self.kind}-train-{name}"

    def load(self) -> dict[str, np.ndarray] | None:
        """Return the arrays, memory-mapped; None if they are not all there, or of another size."""
        found = {}
        for name, (dtype, shape) in self.expected.items():
            try:
                array = np.load(self.path(f"{name}.npy"), mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError):
                return None
            if array.dtype != dtype or array.shape != shape:
                return None
            found[name] = array
        return found

    def are_whole(self) -> bool:
        """Whether the files are those that the description was written for: reads all of them."""
        try:
            description = json.loads(self.path("description.txt").read_text(encoding="utf-8"))
            checksums = description["xxh3_128"]
            return all(
                checksums[name] == _checksum(self.path(f"{name}.npy")) for name in self.expected
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the arrays, each under a temporary name first, and the description last.

        Raises:
            OSError: if the folder cannot be written to.
        """
        self.folder.mkdir(exist_ok=True)
        self.path("description.txt").unlink(missing_ok=True)
        checksums = {}
        for name, array in arrays.items():
            path = self.path(f"{name}.npy")
            _save(path, array)
            checksums[name] = _checksum(path)
        description = {"version": VERSION, **self.identity, "xxh3_128": checksums}
        write_synced(
            self.path("description.txt"), (json.dumps(description, indent=4) + "\n").encode()
        )


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(path.name + ".partial")
    try:
        with named_in_errors(path):
            # Of a killed process, or a link that would lead the bytes elsewhere.
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as stream:
                np.save(stream, array, allow_pickle=False)
            fsync_path(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
