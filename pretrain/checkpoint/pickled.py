"""Files that ``torch.save`` wrote, read without running what a pickle could call."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from pretrain.core.errors import CheckpointError
from pretrain.core.files import JsonObject


def load_pickled(path: Path) -> JsonObject:
    """Return the dictionary in a file: tensors, numbers, strings and containers of them.

    Tensors stay in the file until they are read.

    Raises:
        CheckpointError: for a file that is missing or damaged, holds something else, or asks for
            code to be run.
    """
    try:
        # weights_only: a pickle may call any function. Files from before torch 1.6 are no archives,
        # and cannot be mapped.
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:
        # torch raises RuntimeError, UnpicklingError, EOFError and more for damaged and dangerous
        # files.
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} cannot be read without running code that it holds, or is damaged ({reason}): "
            "take another checkpoint"
        ) from None
    # Somebody may have saved a whole module, or a single tensor.
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no tensors by name: take another checkpoint")
    return content
