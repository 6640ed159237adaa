"""Files that survive a crash: synced writes, checksums, and folders with one writer at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from pretrain.core.errors import ConfigError, StorageError

# A decoded JSON object of another project's format (config.json, a tokenizer, a corpus' record),
# whose keys only its reader knows. What this project writes itself has a typed record instead.
JsonObject: TypeAlias = dict[str, Any]


def fsync_path(path: Path) -> None:
    """Flush a file's content, or the names inside a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durable_folder(path: Path) -> None:
    """Create a folder and its missing parents, each name flushed to disk before the next one.

    Without that a power loss may take a new ``a/b/c`` with everything in it, however well its
    files were flushed.

    Raises:
        OSError: if one cannot be created.
    """
    missing = []
    folder = path
    while not folder.is_dir():
        missing.append(folder)
        # ``Path("a").parent`` is ``Path(".")``, and the parent of "/" is itself: both are there.
        folder = folder.parent
    for folder in reversed(missing):
        # Another rank may have been faster.
        folder.mkdir(exist_ok=True)
        fsync_path(folder.parent)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Errors of the operating system inside the block name the file: those of a write do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_synced(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it.

    A crash leaves the old file or the new one, never a part.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        with named_in_errors(path):
            # Of a killed process, or a link that would lead the bytes elsewhere.
            temporary.unlink(missing_ok=True)
            temporary.write_bytes(data)
            # Content before name: after a power loss a rename may survive that data has not.
            fsync_path(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # The rename itself is a change of the folder.
    fsync_path(path.parent)


def file_sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def leads_outside(path: Path, folder: Path) -> bool:
    """Whether a path below a folder is, or goes through, a link that leaves the folder.

    The hub's cache keeps the files of ``models--X/snapshots/REVISION`` in ``models--X/blobs``,
    which belongs to the folder.
    """
    root = folder.resolve()
    try:
        found = path.resolve()
    # A loop of links, or a name that no file can have.
    except (OSError, RuntimeError, ValueError):
        return True
    if found.is_relative_to(root):
        return False
    return not (root.parent.name == "snapshots" and found.parent == root.parent.with_name("blobs"))


@contextmanager
def only_writer(folder: Path, remedy: str) -> Iterator[None]:
    """Create ``folder`` and lock it against other writers until the block or the process ends.

    Args:
        remedy: how to choose another folder, for the error sentence.

    Raises:
        StorageError: if the folder cannot be created.
        ConfigError: if another process writes to it.
    """
    try:
        make_durable_folder(folder)
    except OSError as error:
        raise StorageError(
            f"cannot create the folder {folder}: {error.strerror}; {remedy}"
        ) from None
    # The kernel releases a flock when the process dies, so no stale lock file can remain.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is writing to {folder}: wait for it to end, or {remedy}"
            ) from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def appearing_folder(output: Path) -> Iterator[Path]:
    """Provide an empty folder that takes the name ``output``, synced, if the block succeeds.

    The previous ``output`` is deleted only after the new folder has its name. If the block fails,
    the new folder is removed; the remains of a killed process are removed by the next one.

    Raises:
        ConfigError: if another process writes to ``output``.
        StorageError: if the folder cannot be created.
    """
    temporary = output.parent / f".{output.name}.partial"
    with only_writer(temporary, f"choose another folder than {output}"):
        _clear(temporary)
        try:
            yield temporary
            # In reverse order, so that a folder is flushed after its entries.
            for path in sorted(temporary.rglob("*"), reverse=True):
                fsync_path(path)
            fsync_path(temporary)
            _take_name(temporary, output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _take_name(new: Path, output: Path) -> None:
    """Rename ``new`` to ``output``; a crash in between leaves the previous one as ``.earlier``."""
    earlier = output.parent / f".{output.name}.earlier"
    shutil.rmtree(earlier, ignore_errors=True)
    if output.exists():
        os.replace(output, earlier)
    try:
        os.replace(new, output)
    except OSError:
        if earlier.exists():
            os.replace(earlier, output)
        raise
    fsync_path(output.parent)
    shutil.rmtree(earlier, ignore_errors=True)
