"""Lists the files of a folder.

Hidden files, files in the hub's cache and unfinished downloads are left out; links are followed.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache

from data_pipeline.sources.files import unreadable
from data_pipeline.sources.records import listed
from pretrain.core.errors import DataError

logger = logging.getLogger(__name__)

POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_POINTER_BYTES = 1024
NO_DATA = {"__pycache__", "__MACOSX"}


@lru_cache(maxsize=1024)
def say(sentence: str) -> None:
    """Says it once in a process: the input is listed several times in a build."""
    logger.warning("%s", sentence)


def walk(root: str) -> list[str]:
    """Paths of the files below a folder, with ``/``, sorted.

    Hidden ones are left out; a folder to which several links lead is read once.

    Raises:
        DataError: for a folder that cannot be listed, a link that leads nowhere, and tables whose
            files alone do not say what is in them.
    """
    return sorted(_walk(root, "", set()))


def _walk(root: str, inside: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    folder = os.path.join(root, inside)
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise unreadable(folder, error) from None
    for entry in entries:
        path = f"{inside}{entry.name}"
        if entry.name.startswith(".") or entry.name in NO_DATA:
            continue
        if entry.name == "_delta_log":
            raise DataError(
                f"{folder} is a Delta Lake table, whose log says which of its files count: write"
                " its rows to plain Parquet files first"
            )
        if entry.is_dir():
            yield from _walk(root, f"{path}/", seen)
        elif entry.is_file():
            yield path
        elif entry.is_symlink():
            raise DataError(
                f"{entry.path} is a link to a file that is not there: fetch it again, or remove the"
                " link"
            )


def snapshot_of(folder: str) -> str:
    """The folder itself, or the current snapshot if it is a data set of the hub's cache.

    Raises:
        DataError: if there are several to choose from, or none.
    """
    snapshots = os.path.join(folder, "snapshots")
    if not (os.path.isdir(snapshots) and os.path.isdir(os.path.join(folder, "blobs"))):
        cached = [name for name in _names(folder) if name.startswith("datasets--")]
        if cached:
            raise DataError(
                f"{folder} is a cache of several data sets of the hub: give the folder of one, such"
                f" as {os.path.join(folder, cached[0])}"
            )
        if glob.glob(
            os.path.join(glob.escape(folder), ".cache/huggingface/download/**/*.incomplete"),
            recursive=True,
        ):
            say(
                f"{folder} holds files of a download that did not end: run 'hf download' again if"
                " any are missing"
            )
        return folder
    found = _names(snapshots)
    try:
        with open(os.path.join(folder, "refs", "main"), encoding="ascii") as stream:
            current = stream.read(100).strip()
    except (OSError, UnicodeDecodeError):
        current = found[0] if len(found) == 1 else ""
    if current not in found:
        problem = (
            f"has the snapshots {listed(found)} and none of them is 'main'"
            if found
            else "holds no snapshot"
        )
        raise DataError(
            f"{folder} {problem}: give the folder of one as --input, or run 'hf download' again"
        )
    if any(name.endswith(".incomplete") for name in _names(os.path.join(folder, "blobs"))):
        say(
            f"{folder} holds files of a download that did not end: run 'hf download' again if any"
            " are missing"
        )
    return os.path.join(snapshots, current)


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from None


def is_saved(root: str) -> bool:
    """True for a folder that ``save_to_disk`` of the package datasets wrote."""
    has_state = os.path.isfile(os.path.join(root, "state.json")) and os.path.isfile(
        os.path.join(root, "dataset_info.json")
    )
    return has_state or os.path.isfile(os.path.join(root, "dataset_dict.json"))


def is_pointer(content: bytes) -> bool:
    """True for what git keeps in place of a large file until 'git lfs pull' fetches it."""
    return content.startswith(POINTER)


def refuse_pointers(paths: Iterable[str]) -> None:
    """Refuse a clone whose large files were not fetched.

    Raises:
        DataError: for such a file, which holds only a pointer.
    """
    for path in paths:
        try:
            if os.path.getsize(path) > LARGEST_POINTER_BYTES:
                continue
            with open(path, "rb") as stream:
                content = stream.read(len(POINTER))
        except OSError:  # reported when it is read
            continue
        if is_pointer(content):
            raise DataError(
                f"{path} is a Git LFS pointer, not the file itself: run 'git lfs pull' in its"
                " repository, or fetch it with 'hf download'"
            )
