"""A merged model appears under its name only after it was scored."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.shards.split import SplitName
from pretrain.core.errors import ConfigError
from pretrain.core.files import fsync_path
from pretrain.evaluation.heldout.heldout import score_checkpoint


@dataclass(frozen=True)
class Scoring:
    """Which held-out windows are scored, and on which device.

    ``data`` is the checkpoint's own by default.
    """

    data: str | None
    split: SplitName
    max_windows: int
    device: torch.device

    def loss(self, checkpoint: Path) -> float:
        """Nats per token.

        Raises:
            DataError: if the data are missing, or do not belong to the checkpoint.
            CheckpointError: if the checkpoint is damaged.
        """
        return score_checkpoint(
            checkpoint,
            self.data,
            self.split,
            self.device,
            max_windows=self.max_windows,
            baselines=(),
        ).loss


def check_empty(output: Path) -> None:
    """Raises :class:`ConfigError` if ``output`` holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is not empty: choose another --output")


@contextmanager
def checked_folder(output: Path) -> Iterator[Path]:
    """A folder that gets the name ``output`` when the block ends, and is removed if it fails.

    Raises:
        ConfigError: if ``output`` holds something.
    """
    output = output.resolve()
    check_empty(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Next to the output: os.replace is atomic only within one file system.
    unchecked = output.parent / f".{output.name}.unchecked-{os.getpid()}"
    try:
        yield unchecked
        os.replace(unchecked, output)
        # Otherwise the new name may be lost in a power failure.
        fsync_path(output.parent)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
