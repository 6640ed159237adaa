"""Files that ``torch.save`` wrote, read without running what a pickle could call."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from pretrain.core.errors import CheckpointError


def load_pickled(path: Path) -> dict[str, Any]:
    """The dictionary in a file: tensors, numbers, texts and containers of them; tensors stay in the
    file until they are read.

    Raises:
        CheckpointError: for a file that is missing or damaged, holds something else, or asks for
            code to be run.
    """
    try:
        # Files from before torch 1.6 are no archives and cannot be mapped.
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    # torch raises RuntimeError, UnpicklingError, EOFError and more for damaged and for dangerous
    # files
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} cannot be read without running code that it holds, or is damaged ({reason}):"
            " take another checkpoint"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no tensors by name: take another checkpoint")
    return content
