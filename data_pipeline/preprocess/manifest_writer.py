"""The account of a build: totals over units, reports of what is not in the shards, and the
manifest.
"""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tokenizers

from data_pipeline.preprocess.merge import kept_documents
from data_pipeline.preprocess.plan import BuildPlan
from data_pipeline.preprocess.worker import (
    LEFT_OUT,
    MARKS,
    NAMES,
    SIDES,
    TEXT_BYTES,
    Record,
    unit_folder,
)
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.indexed import IndexedReader, token_dtype
from data_pipeline.shards.manifest import (
    Manifest,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
)
from data_pipeline.shards.split import SPLITS, SplitName
from data_pipeline.tokenizer.tokenizer import Tokenizer

BAD_RECORDS, DROPPED_DOCUMENTS = "bad_records.jsonl", "dropped_documents.jsonl"
DUPLICATES = {1: "exact_duplicate", 2: "near_duplicate"}


def total(records: Iterable[Record], name: str) -> Counter[str]:
    """The sum of one of the records' counters."""
    result: Counter[str] = Counter()
    for record in records:
        result.update(record[name])
    return result


def source_sha256(records: list[Record], source: str) -> str:
    """SHA-256 over the checksums of a source's units, in order."""
    return hashlib.sha256(
        "".join(record["checksum"] for record in records if record["source"] == source).encode(
            "ascii"
        )
    ).hexdigest()


class Account:
    """Documents, tokens and bytes that stay, by split and source; what deduplication removed, by
    source.
    """

    def __init__(self, workspace: Path, records: list[Record]) -> None:
        self.documents: Counter[tuple[SplitName, str]] = Counter()
        self.tokens: Counter[tuple[SplitName, str]] = Counter()
        self.utf8_bytes: Counter[tuple[SplitName, str]] = Counter()
        self.duplicates: dict[str, Counter[str]] = {}
        for record in records:
            self._add(workspace, record)

    def _add(self, workspace: Path, record: Record) -> None:
        folder, source = unit_folder(workspace, "units", record["unit"]), record["source"]
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
            counts = record["splits"][split]
            if marks.any():
                kept = kept_documents(workspace, record["unit"], split)
                assert kept is not None
                lengths, sizes = (
                    IndexedReader(folder / split).sequence_lengths,
                    np.load(folder / TEXT_BYTES)[np.load(folder / SIDES) == side],
                )
                counts = {
                    "documents": kept.sum(),
                    "tokens": lengths[kept].sum(),
                    "utf8_bytes": sizes[kept].sum(),
                }
            self.documents[split, source] += int(counts["documents"])
            self.tokens[split, source] += int(counts["tokens"])
            self.utf8_bytes[split, source] += int(counts["utf8_bytes"])


def describe(
    plan: BuildPlan,
    output: Output,
    workspace: Path,
    records: list[Record],
    shards: list[dict[str, Any]],
    tokenizer: Tokenizer,
) -> tuple[Manifest, list[str]]:
    """The manifest of a finished build, and the names of the files to publish: shards, and reports
    where there is something to report.
    """
    account = Account(workspace, records)
    names = [shard["prefix"] + ending for shard in shards for ending in (".bin", ".idx")]
    for name, rows in (
        (BAD_RECORDS, _numbered_rows(plan, workspace, records)),
        (DROPPED_DOCUMENTS, _dropped_rows(workspace, records)),
    ):
        path = workspace / "shards" / output.name(name)
        if _write_rows(path, rows):
            names.append(path.name)
    manifest = Manifest(
        created_by=f"tools/preprocess_data.py with tokenizers {tokenizers.__version__}",
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
            if any(shard["split"] == split for shard in shards)
        },
        streamed=plan.config.streaming,
    )
    return manifest, names


def tokenizer_entry(tokenizer: Tokenizer, output: Output) -> TokenizerEntry:
    """The tokenizer, as a manifest has it."""
    return TokenizerEntry(
        file=output.tokenizer,
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
        append_eod=tokenizer.append_eod,
        prepend_bos=tokenizer.prepend_bos,
    )


def _split_entry(split: SplitName, shards: list[dict[str, Any]], account: Account) -> SplitEntry:
    def of_split(counter: Counter[tuple[SplitName, str]]) -> int:
        return sum(count for (where, _), count in counter.items() if where == split)

    entries = [
        ShardEntry(**{key: value for key, value in shard.items() if key != "split"})
        for shard in shards
        if shard["split"] == split
    ]
    return SplitEntry(
        documents=of_split(account.documents),
        tokens=of_split(account.tokens),
        utf8_bytes=of_split(account.utf8_bytes),
        shards=entries,
    )


def _source_entry(
    plan: BuildPlan, name: str, records: list[Record], account: Account
) -> SourceEntry:
    mine = [record for record in records if record["source"] == name]
    section = plan.config.named_sources[name]
    train_tokens = sum(count for (split, _), count in account.tokens.items() if split == "train")

    def of_source(counter: Counter[tuple[SplitName, str]]) -> int:
        return sum(count for (_, source), count in counter.items() if source == name)

    return SourceEntry(
        kind=section.kind,
        python_version=platform.python_version() if section.kind == "python_stdlib" else None,
        sha256=source_sha256(records, name),
        records=sum(record["records"] for record in mine),
        documents=of_source(account.documents),
        tokens=of_source(account.tokens),
        utf8_bytes=of_source(account.utf8_bytes),
        share=round(account.tokens["train", name] / train_tokens, 6) if train_tokens else 0.0,
        bad=_sorted(total(mine, "bad")),
        left_out=_sorted(total(mine, "left_out")),
        dropped=_sorted(total(mine, "dropped") + account.duplicates.get(name, Counter())),
        edits=_sorted(total(mine, "edits")),
        notes=_sorted(total(mine, "notes")),
    )


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _numbered_rows(
    plan: BuildPlan, workspace: Path, records: list[Record]
) -> Iterator[dict[str, Any]]:
    """The bad records of all units; their lines, counted from the start of each unit, are numbered
    from the start of the file.
    """
    lines_before: Counter[tuple[str, str]] = Counter()
    for record in records:
        unit = plan.units[record["unit"]]
        file = (unit.source, unit.files[0])
        for row in _rows(unit_folder(workspace, "units", record["unit"]) / LEFT_OUT):
            if row.get("bad"):
                del row["bad"]
                if row["line"] is not None and unit.start:
                    row["line"] += lines_before[file]
                yield {"source": unit.source, **row}
        lines_before[file] += record["lines"]


def _dropped_rows(workspace: Path, records: list[Record]) -> Iterator[dict[str, Any]]:
    """The documents that the source itself, cleaning and deduplication left out."""
    for record in records:
        folder = unit_folder(workspace, "units", record["unit"])
        yield from (
            {"source": record["source"], **row}
            for row in _rows(folder / LEFT_OUT)
            if not row.get("bad")
        )
        if (folder / MARKS).exists():
            marks = np.load(folder / MARKS)
            with (folder / NAMES).open("rb") as names:
                for mark, name in zip(marks, names, strict=True):
                    if mark:
                        yield {
                            "source": record["source"],
                            "document": orjson.loads(name),
                            "reason": DUPLICATES[int(mark)],
                            "detail": "",
                        }


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:
        for line in stream:
            yield orjson.loads(line)


def _write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Writes rows as JSON lines; no rows leave no file."""
    count = 0
    with path.open("wb") as stream:
        for row in rows:
            stream.write(orjson.dumps(row) + b"\n")
            count += 1
    if not count:
        path.unlink()
    return count
