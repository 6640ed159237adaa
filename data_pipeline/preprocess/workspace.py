"""The staging folder of a build: what is finished in it, and how it takes its final names."""

from __future__ import annotations

import errno
import glob
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.shards.manifest import MANIFEST_NAME
from data_pipeline.tokenizer.files import name_of
from pretrain.core import faults
from pretrain.core.errors import StorageError
from pretrain.core.files import JsonObject, fsync_path, write_synced

logger = logging.getLogger(__name__)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RECORD = "record.json"


@dataclass(frozen=True)
class Output:
    """The place of a build's files: a folder, or a common prefix next to other files.

    Attributes:
        folder: of all files.
        prefix: their common beginning; empty for a folder of their own.
    """

    folder: Path
    prefix: str = ""

    @property
    def staging(self) -> Path:
        """The folder of an unfinished build, on the same file system as the output."""
        return self.folder / (f".{self.prefix}.building" if self.prefix else ".building")

    @property
    def path(self) -> Path:
        """The value of data.path in a recipe that uses the data."""
        return self.folder / self.prefix if self.prefix else self.folder

    def name(self, name: str) -> str:
        """Return the name of a file next to the shards, such as the manifest."""
        return f"{self.prefix}.{name}" if self.prefix else name

    def shard(self, split: str, source: str, number: int, of: int, only_source: bool) -> str:
        """Return a shard's name without ending.

        Such as ``train``, ``train_code``, ``train_00003``; under a prefix ``corpus``,
        ``corpus_validation``.
        """
        parts = [self.prefix or split]
        if self.prefix and split != "train":
            parts.append(split)
        if not only_source:
            parts.append(source)
        if of > 1:
            parts.append(f"{number:05}")
        return "_".join(parts)

    @property
    def manifest(self) -> Path:
        """The path of the manifest."""
        return self.folder / self.name(MANIFEST_NAME)

    def tokenizer(self, content: bytes) -> str:
        """Return the name of the tokenizer's file, by what is in it."""
        return self.name(name_of(content))


def begin_staging(folder: Path, request_sha256: str) -> None:
    """Make the staging folder; what a build of another request has left in it is removed."""
    found = read_json(folder / "identity.json")
    if folder.exists() and (found is None or found["request_sha256"] != request_sha256):
        if found is not None:
            logger.warning("an unfinished build of another request in %s is removed", folder)
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)


def remove_unused(output: Output, is_new: bool) -> None:
    """Remove a staging folder in which no build has begun, and an output folder made for it."""
    if not (output.staging / "identity.json").exists():
        shutil.rmtree(output.staging, ignore_errors=True)
    if is_new and not any(output.folder.iterdir()):
        output.folder.rmdir()


class Workspace:
    """The staging folder.

    Each piece of work is done in an attempt folder, which takes its place with one rename.

    Args:
        folder: the staging folder, as :func:`begin_staging` left it.
        identity: what the pieces in it belong to; those of another input, or made by other code of
            a plugin, are removed, apart from what was read from standard input.
    """

    def __init__(self, folder: Path, identity: dict[str, str]) -> None:
        self.folder = folder
        found = read_json(folder / "identity.json")
        if found != identity:
            if found is not None:
                logger.warning(
                    "an unfinished build %s in %s is removed", _why(found, identity), folder
                )
            for path in folder.iterdir():
                if not path.name.startswith("input-"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in ("places", "units", "samples", "shards"):
            (folder / name).mkdir(exist_ok=True)
        shutil.rmtree(folder / "attempts", ignore_errors=True)
        (folder / "attempts").mkdir()
        write_synced(folder / "identity.json", json.dumps(identity).encode())


def _why(found: JsonObject, identity: dict[str, str]) -> str:
    """Return what an unfinished build has that this one has not, for the log."""
    code = {"plugins_sha256": identity.get("plugins_sha256")}
    return "by other code of its plugins" if found | code == identity | code else "of other input"


@contextmanager
def attempt(workspace: Path, place: Path) -> Iterator[Path]:
    """Yield a folder to work in, which becomes ``place`` at the end of the block.

    Another process may have been faster with the same content.
    """
    # A random name, since another process may work on the same unit.
    folder = workspace / "attempts" / uuid.uuid4().hex
    folder.mkdir()
    try:
        yield folder
        try:
            # A rename inside one file system is atomic: ``place`` is complete or does not exist.
            os.rename(folder, place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def no_space_is_told(folder: Path) -> Iterator[None]:
    """Report a full disk inside the block in one sentence.

    Raises:
        StorageError: if the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        # ``from None``: a user with a full disk has no use for the traceback of the write.
        raise StorageError(
            f"{error.strerror} while writing data into {folder}: free some space, then run the same"
            " command, which continues from where it stopped"
        ) from None


@contextmanager
def interruption_is_reported(output: Output) -> Iterator[None]:
    """Report what is kept when Ctrl-C ends the block."""
    try:
        yield
    except KeyboardInterrupt:
        kept = (
            f"what is finished is kept in {output.staging}"
            if (output.staging / "identity.json").exists()
            else "nothing was begun"
        )
        raise KeyboardInterrupt(f"{kept}, and the data in {output.path} is as it was") from None


def read_json(path: Path) -> JsonObject | None:
    """Return a JSON object, or None if there is no complete one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def publish(workspace: Path, output: Output, names: list[str], manifest: bytes) -> None:
    """Move the finished files to their names, the manifest last.

    A killed one is finished by :func:`finish_publishing`.
    """
    write_synced(
        workspace / "publishing.json",
        json.dumps({"names": names, "manifest": manifest.decode()}).encode(),
    )
    finish_publishing(workspace, output)


def finish_publishing(workspace: Path, output: Output) -> bool:
    """Complete a publication that has begun; false if none has begun."""
    found = read_json(workspace / "publishing.json")
    if found is None:
        return False
    # While old and new files are mixed there must be no manifest that vouches for them.
    old = read_json(output.manifest)
    output.manifest.unlink(missing_ok=True)
    for name in _files_of(old) - set(found["names"]):
        (output.folder / name).unlink(missing_ok=True)
        # Packings belong to the old shards; training makes new ones.
        for packing in output.folder.glob(f"{glob.escape(Path(name).stem)}.pack-*"):
            packing.unlink()
    for name in found["names"]:
        staged = workspace / "shards" / name
        if staged.exists():
            faults.reached("preprocess.publish")
            os.replace(staged, output.folder / name)
    # The renames must be on disk before a manifest can vouch for the files.
    fsync_path(output.folder)
    faults.reached("preprocess.publish")
    write_synced(output.manifest, found["manifest"].encode())
    shutil.rmtree(workspace, ignore_errors=True)
    return True


def _files_of(manifest: dict | None) -> set[str]:
    """Return the files that an earlier manifest names.

    None of them may stay if the next manifest does not name it.
    """
    if manifest is None:
        return set()
    shards = [
        shard["prefix"]
        for split in manifest.get("splits", {}).values()
        for shard in split["shards"]
    ]
    return {Path(prefix + ending).name for prefix in shards for ending in (".bin", ".idx")}
