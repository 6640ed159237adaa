"""Safe ways to write into a data folder: one writer at a time, a staging folder, and names that appear only when all is complete."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.config.errors import StorageError

STAGING = ".building"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sync_folder(folder: Path) -> None:
    """Brings renames inside ``folder`` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, brings it to disk, and gives it its name."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds ``folder``, which is created, against other builds; the lock goes with the process, also with a killed one.

    Raises:
        StorageError: where the folder cannot be created, or another process builds in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create the folder {folder}: {error.strerror}; choose another --output") from None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"another process is building data in {folder}: wait for it to end, or choose another folder") from None
        yield
    finally:
        os.close(descriptor)


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
    sync_folder(folder)
