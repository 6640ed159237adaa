"""A run's ledger: what was trained on which data, by which code, between which checkpoints.

``runs/X/ledger.jsonl`` has a record for each start of the run, each published checkpoint and each
rollback. A record holds the hash of the one before it and its own, and a checkpoint's record the
hash of the checkpoint's manifest, which holds those of its files: so a whole run, over crashes,
moves and changes of its topology, is one chain.

Whoever can write all files can also compute a whole new chain. Against that helps a copy of the
last record's hash at another place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import NotRequired, TypedDict

from pretrain.checkpoint.layout import MANIFEST, step_of
from pretrain.core.files import JsonObject, file_sha256, fsync_path

logger = logging.getLogger(__name__)

LEDGER = "ledger.jsonl"
START, CHECKPOINT, ROLLBACK = "start", "checkpoint", "rollback"


class Origin(TypedDict):
    """Where a start of a run continues.

    Attributes:
        kind: "new" for initial weights, "checkpoint" for one of this run, "branch" for one of
            another run.
        manifest: SHA-256 of the checkpoint's manifest.
        path: of another run's checkpoint, or of given initial weights.
    """

    kind: str
    manifest: NotRequired[str]
    path: NotRequired[str]


class SegmentFacts(TypedDict):
    """What a segment of a run is computed with; hashes are SHA-256 in hexadecimal.

    Attributes:
        code: version, git commit if there is one, and a hash over the packages' sources.
        data: over the fingerprints of all data.
        recipe: as resolved.
    """

    code: JsonObject
    data: str
    recipe: str
    world_size: int
    ep_size: int
    sp_size: int
    tp_size: int
    zero_stage: int


def record_hash(record: JsonObject) -> str:
    """Return the SHA-256 over a record without its own hash."""
    content = {name: value for name, value in record.items() if name != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def split_lines(content: bytes) -> tuple[list[bytes], bytes]:
    """Return the whole lines of a ledger, and what a killed process left of one more."""
    *lines, torn = content.split(b"\n")
    return lines, torn


class Ledger:
    """Appends to a run's ledger. Only rank 0 makes it, which owns the run's folder.

    A line that was cut off by a kill is removed: what it would have recorded has not happened,
    because a checkpoint's record is written before the checkpoint gets its name.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER
        self._torn = 0
        self._number = 0
        self._previous = ""
        if not self.path.is_file():
            return
        lines, torn = split_lines(self.path.read_bytes())
        if torn:
            self._torn = len(torn)
            logger.warning("removed a torn record of %d bytes from %s", len(torn), self.path)
            os.truncate(self.path, self.path.stat().st_size - len(torn))
        self._number = len(lines)
        if lines:
            try:
                self._previous = str(json.loads(lines[-1])["sha256"])
            except (ValueError, KeyError, TypeError):
                # The run is worth more than its ledger: its check reports the break.
                logger.warning("the last record of %s is damaged: the chain breaks", self.path)
                self._previous = "damaged"

    def start(self, step: int, origin: Origin, facts: SegmentFacts) -> None:
        """Record that a start of the run begins to train after ``step`` steps."""
        torn = {"removed_torn_bytes": self._torn} if self._torn else {}
        self._append(START, step, {"from": origin, **facts, **torn})

    def checkpoint(self, step: int, manifest: Path) -> None:
        """Record a checkpoint that is about to be published."""
        self._append(CHECKPOINT, step, {"manifest": file_sha256(manifest)})

    def rollback(self, kept: Path) -> None:
        """Record that the run goes back to a checkpoint."""
        self._append(ROLLBACK, step_of(kept), {"manifest": file_sha256(kept / MANIFEST)})

    def _append(self, event: str, step: int, content: JsonObject) -> None:
        record: JsonObject = {
            "number": self._number,
            "event": event,
            "step": step,
            **content,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "previous": self._previous,
        }
        record["sha256"] = record_hash(record)
        is_new = not self.path.exists()
        with self.path.open("ab") as file:
            file.write(json.dumps(record).encode("ascii") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            fsync_path(self.path.parent)
        self._number += 1
        self._previous = record["sha256"]
