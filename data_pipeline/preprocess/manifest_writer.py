"""The account of a build: totals over units, reports of what is left out, and the manifest."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import orjson

from data_pipeline.preprocess.merge import ShardRecord, kept_documents
from data_pipeline.preprocess.plan import BuildPlan
from data_pipeline.preprocess.unit_record import SplitCounts, UnitRecord
from data_pipeline.preprocess.worker import (
    LEFT_OUT,
    MARKS,
    NAMES,
    SIDES,
    TEXT_BYTES,
    unit_folder,
)
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.indexed import IndexedReader, token_dtype
from data_pipeline.shards.manifest import (
    Manifest,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
)
from data_pipeline.shards.recorded import held_out_sha256
from data_pipeline.shards.split import SPLITS, SplitName
from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.core.files import JsonObject

BAD_RECORDS = "bad_records.jsonl"
DROPPED_DOCUMENTS = "dropped_documents.jsonl"
DUPLICATES = {1: "exact_duplicate", 2: "near_duplicate"}


def total(counters: Iterable[Mapping[str, int]]) -> Counter[str]:
    """Return the sum of counters, such as those of several units."""
    result: Counter[str] = Counter()
    for counter in counters:
        result.update(counter)
    return result


def source_sha256(records: list[UnitRecord], source: str) -> str:
    """SHA-256 over the checksums of a source's units, in order."""
    return hashlib.sha256(
        "".join(record.checksum for record in records if record.source == source).encode("ascii")
    ).hexdigest()


class Account:
    """Documents, tokens and bytes that stay, by split and source, and removed duplicates."""

    def __init__(self, workspace: Path, records: list[UnitRecord]) -> None:
        self.documents: Counter[tuple[SplitName, str]] = Counter()
        self.tokens: Counter[tuple[SplitName, str]] = Counter()
        self.utf8_bytes: Counter[tuple[SplitName, str]] = Counter()
        self.duplicates: dict[str, Counter[str]] = {}
        for record in records:
            self._add(workspace, record)

    def _add(self, workspace: Path, record: UnitRecord) -> None:
        folder = unit_folder(workspace, "units", record.unit)
        source = record.source
        marks = np.load(folder / MARKS) if (folder / MARKS).exists() else np.zeros(0, np.uint8)
        removed = self.duplicates.setdefault(source, Counter())
        removed.update(
            {
                reason: int((marks == mark).sum())
                for mark, reason in DUPLICATES.items()
                if (marks == mark).any()
            }
        )
        for side, split in enumerate(SPLITS):
            counts = record.splits[split]
            if marks.any():
                kept = kept_documents(workspace, record.unit, split)
                assert kept is not None
                lengths = IndexedReader(folder / split).sequence_lengths
                sizes = np.load(folder / TEXT_BYTES)[np.load(folder / SIDES) == side]
                # numpy integers would not become JSON.
                counts = SplitCounts(
                    int(kept.sum()), int(lengths[kept].sum()), int(sizes[kept].sum())
                )
            self.documents[split, source] += counts.documents
            self.tokens[split, source] += counts.tokens
            self.utf8_bytes[split, source] += counts.utf8_bytes


def describe(
    plan: BuildPlan,
    output: Output,
    workspace: Path,
    records: list[UnitRecord],
    shards: list[ShardRecord],
    tokenizer: Tokenizer,
) -> tuple[Manifest, list[str]]:
    """Return the manifest of a finished build, and the names of the files to publish.

    These are the shards, and reports if there is something to report.
    """
    account = Account(workspace, records)
    names = [shard.entry.prefix + ending for shard in shards for ending in (".bin", ".idx")]
    for name, rows in (
        (BAD_RECORDS, _numbered_rows(plan, workspace, records)),
        (DROPPED_DOCUMENTS, _dropped_rows(workspace, records)),
    ):
        path = workspace / "shards" / output.name(name)
        if _write_rows(path, rows):
            names.append(path.name)
    library = tokenizer.reference.engine
    manifest = Manifest(
        created_by=f"tools/preprocess_data.py with {library} {version(library)}",
        request_sha256=plan.request_sha256,
        inputs_sha256=plan.inputs_sha256,
        dtype="uint16" if token_dtype(tokenizer.vocab_size).itemsize == 2 else "int32",
        tokenizer=tokenizer_entry(tokenizer, output),
        sources={
            name: _source_entry(plan, name, records, account) for name in plan.config.named_sources
        },
        splits={
            split: _split_entry(split, shards, account)
            for split in SPLITS
            if any(shard.split == split for shard in shards)
        },
        streamed=plan.config.streaming,
        held_out_sha256=held_out_sha256(plan.config),
    )
    return manifest, names


def tokenizer_entry(tokenizer: Tokenizer, output: Output) -> TokenizerEntry:
    """The tokenizer, as a manifest has it."""
    return TokenizerEntry(
        file=output.tokenizer(tokenizer.content),
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
        append_eod=tokenizer.append_eod,
        prepend_bos=tokenizer.prepend_bos,
        parse_special_tokens=True if tokenizer.parse_special_tokens else None,
    )


def _split_entry(split: SplitName, shards: list[ShardRecord], account: Account) -> SplitEntry:
    def of_split(counter: Counter[tuple[SplitName, str]]) -> int:
        return sum(count for (where, _), count in counter.items() if where == split)

    entries = [shard.entry for shard in shards if shard.split == split]
    return SplitEntry(
        documents=of_split(account.documents),
        tokens=of_split(account.tokens),
        utf8_bytes=of_split(account.utf8_bytes),
        shards=entries,
    )


def _source_entry(
    plan: BuildPlan, name: str, records: list[UnitRecord], account: Account
) -> SourceEntry:
    mine = [record for record in records if record.source == name]
    section = plan.config.named_sources[name]
    train_tokens = sum(count for (split, _), count in account.tokens.items() if split == "train")

    def of_source(counter: Counter[tuple[SplitName, str]]) -> int:
        return sum(count for (_, source), count in counter.items() if source == name)

    return SourceEntry(
        kind=section.kind,
        python_version=platform.python_version() if section.kind == "python_stdlib" else None,
        revision=plan.revisions.get(name),
        sha256=source_sha256(records, name),
        records=sum(record.records for record in mine),
        documents=of_source(account.documents),
        tokens=of_source(account.tokens),
        utf8_bytes=of_source(account.utf8_bytes),
        share=round(account.tokens["train", name] / train_tokens, 6) if train_tokens else 0.0,
        bad=_sorted(total(record.bad for record in mine)),
        left_out=_sorted(total(record.left_out for record in mine)),
        dropped=_sorted(
            total(record.dropped for record in mine) + account.duplicates.get(name, Counter())
        ),
        edits=_sorted(total(record.edits for record in mine)),
        notes=_sorted(total(record.notes for record in mine)),
    )


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _numbered_rows(
    plan: BuildPlan, workspace: Path, records: list[UnitRecord]
) -> Iterator[JsonObject]:
    """Yield the bad records of all units, their lines numbered from the start of the file.

    A unit counts its lines from its own start.
    """
    lines_before: Counter[tuple[str, str]] = Counter()
    for record in records:
        unit = plan.units[record.unit]
        file = (unit.source, unit.files[0])
        for row in _rows(unit_folder(workspace, "units", record.unit) / LEFT_OUT):
            if row.get("bad"):
                del row["bad"]
                if row["line"] is not None and unit.start:
                    row["line"] += lines_before[file]
                yield {"source": unit.source, **row}
        lines_before[file] += record.lines


def _dropped_rows(workspace: Path, records: list[UnitRecord]) -> Iterator[JsonObject]:
    """The documents that the source itself, cleaning and deduplication left out."""
    for record in records:
        folder = unit_folder(workspace, "units", record.unit)
        yield from (
            {"source": record.source, **row}
            for row in _rows(folder / LEFT_OUT)
            if not row.get("bad")
        )
        if (folder / MARKS).exists():
            marks = np.load(folder / MARKS)
            with (folder / NAMES).open("rb") as names:
                for mark, name in zip(marks, names, strict=True):
                    if mark:
                        yield {
                            "source": record.source,
                            "document": orjson.loads(name),
                            "reason": DUPLICATES[int(mark)],
                            "detail": "",
                        }


def _rows(path: Path) -> Iterator[JsonObject]:
    with path.open("rb") as stream:
        for line in stream:
            yield orjson.loads(line)


def _write_rows(path: Path, rows: Iterator[JsonObject]) -> int:
    """Writes rows as JSON lines; no rows leave no file."""
    count = 0
    with path.open("wb") as stream:
        for row in rows:
            stream.write(orjson.dumps(row) + b"\n")
            count += 1
    if not count:
        path.unlink()
    return count
