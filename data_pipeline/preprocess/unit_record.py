"""The record of a unit: what a worker reports about it, and a later run reads from its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from data_pipeline.preprocess.workspace import read_json
from data_pipeline.shards.split import SplitName


@dataclass(frozen=True)
class SplitCounts:
    """The part of one split that a unit has.

    Attributes:
        utf8_bytes: of its texts.
    """

    documents: int
    tokens: int
    utf8_bytes: int


@dataclass(frozen=True)
class UnitRecord:
    """Counts of one unit; its JSON is one object with these names, in this order.

    Attributes:
        unit: its number in the build's plan.
        source: the source's name in the recipe.
        lines: of the input, so that the next unit of the same file can number its own.
        records: of the input, bad ones included.
        documents: that are left after cleaning and before deduplication.
        hashed: of these documents, those whose side of the split a hash decides.
        checksum: SHA-256 over the documents that were read.
        lowest, highest: places in [0, 1) of the hashed documents; None without any.
        bad, left_out, dropped: records without a document, by reason.
        edits, notes: changes that cleaning made, and remarks of the source, by name.
        bad_bytes: bytes of the input that are lost with bad records, about.
        bad_examples: the place of the first bad record of each reason.
        splits: by split; empty for a unit that was not encoded.
        plan: what the unit was encoded for; one with another plan is encoded again.
        boot: changes when the machine is restarted.
        checksums: of the files in the unit's folder, by name.
    """

    unit: int
    source: str
    lines: int
    records: int
    documents: int
    hashed: int
    checksum: str
    lowest: float | None
    highest: float | None
    bad: dict[str, int]
    left_out: dict[str, int]
    dropped: dict[str, int]
    edits: dict[str, int]
    notes: dict[str, int]
    bad_bytes: int
    bad_examples: dict[str, str]
    splits: dict[SplitName, SplitCounts] = field(default_factory=dict)
    plan: list[object] = field(default_factory=list)
    boot: str = ""
    checksums: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the JSON of the record's file."""
        content = asdict(self)
        if not self.splits:
            del content["splits"]
        return json.dumps(content)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read the record of a finished unit; None if there is no complete one."""
        content = read_json(path)
        if content is None:
            return None
        splits = content.pop("splits", {})
        try:
            counts = {split: SplitCounts(**part) for split, part in splits.items()}
            return cls(**content, splits=counts)
        except TypeError:  # fields of another version: the unit is done again
            return None
