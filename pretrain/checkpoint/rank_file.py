"""What one rank saves for itself: plain values in JSON, and the tensors among them.

Reading such a file runs no code: it is a safetensors file, with the JSON in its header.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoint.engine_state import write_tensors
from pretrain.checkpoint.layout import FileEntry
from pretrain.checkpoint.optimizer_state import Stored
from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.core.errors import CheckpointError

CONTENT = "content"
# In the JSON a tensor is an object with its name in the file.
TENSOR = "tensor"


def write_rank_file(path: Path, content: Any) -> FileEntry:
    """Write dictionaries with strings as keys, lists, numbers, strings and tensors.

    Tuples become lists.
    """
    tensors: list[Stored] = []
    text = json.dumps(_without_tensors(content, tensors))
    return write_tensors(path, tensors, {CONTENT: text})


def read_rank_file(path: Path) -> Any:
    """Return what :func:`write_rank_file` wrote.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    reader = TensorReader([path])
    try:
        return _with_tensors(json.loads(reader.metadata[CONTENT]), reader)
    except (KeyError, ValueError, RecursionError):
        raise CheckpointError(
            f"{path} holds no state of a rank: the checkpoint is damaged, choose another step_N "
            "folder"
        ) from None


def _without_tensors(value: Any, tensors: list[Stored]) -> Any:
    """The value with names in place of its tensors, which are added to ``tensors``."""
    if isinstance(value, Tensor):
        tensors.append(Stored(f"{len(tensors)}", value.detach().cpu()))
        return {TENSOR: tensors[-1].name}
    if isinstance(value, dict):
        return {key: _without_tensors(inner, tensors) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(inner, tensors) for inner in value]
    return value


def _with_tensors(value: Any, reader: TensorReader) -> Any:
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return reader.read(value[TENSOR])
        return {key: _with_tensors(inner, reader) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_tensors(inner, reader) for inner in value]
    return value
