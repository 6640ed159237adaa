"""One hash for each tensor of a checkpoint, the same whatever topology has written it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from pretrain.checkpoint.optimizer_state import StoredStates
from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.checkpoint.weights import OPTIMIZER, WEIGHTS, files_of

# Of a tensor that is hashed at once.
CHUNK = 1 << 24
# Rows of a table: none has as many.
ALL_ROWS = 1 << 62


def state_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every weight, and of every state ``<parameter>/<state>``.

    8-bit states are hashed by their values, and expert tables by their used rows.

    Raises:
        CheckpointError: if files are missing or damaged.
    """
    weights = TensorReader(files_of(folder, WEIGHTS))
    hashes = {
        name: _hash_of(
            weights.read_range(name, start, stop) for start, stop in _chunks(weights, name)
        )
        for name in weights.names
    }
    optimizer = TensorReader(files_of(folder, OPTIMIZER))
    stored = StoredStates(optimizer)
    for parameter, keys in stored.keys.items():
        for key in keys:
            name = f"{parameter}/{key}"
            hashes[name] = _hash_of(
                stored.dequantized(name, start, stop).values
                for start, stop in _chunks(optimizer, name)
            )
    for table in stored.tables:
        for key, values in stored.rows(table, 0, ALL_ROWS).items():
            hashes[f"{table}/{key}"] = _hash_of([values])
    return hashes


def _chunks(reader: TensorReader, name: str) -> list[tuple[int, int]]:
    elements = reader.form(name).elements
    return [(first, min(first + CHUNK, elements)) for first in range(0, elements, CHUNK)]


def _hash_of(parts: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.contiguous().numpy().data)
    return found.hexdigest()
