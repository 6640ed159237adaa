"""A staging folder, and names that appear only when all is complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.config.durable import fsync_path
from pretrain.config.errors import StorageError

STAGING = ".building"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """An empty folder inside ``folder``, on the same file system, that is gone afterwards with everything left in it.

    Raises:
        StorageError: where the disk fills up inside the block.
    """
    staged = folder / STAGING
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        yield staged
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise StorageError(
            f"{error.strerror} while writing data into {folder}: free some space or choose another folder, then run the same command"
        ) from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def publish(staged: Path, folder: Path, names: Iterable[str]) -> None:
    """Moves complete files out of the staging folder, in the given order, over older ones of the same name."""
    for name in names:
        os.replace(staged / name, folder / name)
    fsync_path(folder)
