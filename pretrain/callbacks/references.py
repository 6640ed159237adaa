"""Checkpoints as trackers refer to them: by path and hash, without a copy."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.layout import (
    MANIFEST,
    complete_checkpoints,
    pointers,
    read_manifest,
    step_of,
)
from pretrain.core.errors import CheckpointError
from pretrain.core.files import JsonObject, file_sha256

SETTLED_NS = 1_000_000_000


@dataclass(frozen=True)
class CheckpointReference:
    """A published checkpoint.

    Attributes:
        path: absolute, of its folder.
        names: pointers that name it, such as "latest" or "best".
        sha256: of its manifest, which holds the SHA-256 of every other file.
        bytes: of all files that the manifest lists.
    """

    path: Path
    step: int
    names: tuple[str, ...]
    sha256: str
    bytes: int

    @property
    def uri(self) -> str:
        """The folder's ``file://`` address."""
        return self.path.as_uri()

    @property
    def manifest(self) -> Path:
        """The file with the hashes of all others."""
        return self.path / MANIFEST

    def facts(self) -> JsonObject:
        """What a tracker shows of it."""
        return {
            "uri": self.uri,
            "step": self.step,
            "manifest_sha256": self.sha256,
            "bytes": self.bytes,
        }


class CheckpointWatch:
    """Finds checkpoints that were published since it last looked, also by a background save."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._changed_ns = -1
        self._known: dict[str, set[str]] = {}

    def new(self) -> list[CheckpointReference]:
        """Return those that are new or have got another name, oldest first.

        It mostly costs one ``stat``: publishing and pointing change the folder's time.
        """
        try:
            changed_ns = self._folder.stat().st_mtime_ns
        except FileNotFoundError:
            return []
        # Two changes within one tick of the clock have the same time, so a young one is looked at
        # again.
        if changed_ns == self._changed_ns and time.time_ns() - changed_ns > SETTLED_NS:
            return []
        self._changed_ns = changed_ns
        named: dict[str, list[str]] = {}
        for name, target in pointers(self._folder).items():
            named.setdefault(target, []).append(name)
        found = []
        for checkpoint in reversed(complete_checkpoints(self._folder)):
            try:
                reference = _reference(checkpoint, tuple(named.get(checkpoint.name, ())))
            # Removed meanwhile, because newer ones are there.
            except (CheckpointError, OSError):
                continue
            # Another content of the same step is another checkpoint: a rollback may make one.
            identity = f"{checkpoint.name}:{reference.sha256}"
            before = self._known.setdefault(identity, set())
            is_new = not before or not before.issuperset(reference.names)
            # Also without a pointer's name, a checkpoint is known once.
            before |= {"", *reference.names}
            if is_new:
                found.append(reference)
        return found


def _reference(checkpoint: Path, names: tuple[str, ...]) -> CheckpointReference:
    return CheckpointReference(
        path=checkpoint.resolve(),
        step=step_of(checkpoint),
        names=names,
        sha256=file_sha256(checkpoint / MANIFEST),
        bytes=sum(entry["bytes"] for entry in read_manifest(checkpoint).values()),
    )
