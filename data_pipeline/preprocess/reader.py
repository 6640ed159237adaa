"""Reading one unit: its clean documents, and an account of everything else."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TextIO

from pydantic import TypeAdapter

from data_pipeline.cleaning.cleaner import Cleaner
from data_pipeline.cleaning.config import Cleaning
from data_pipeline.config import AnySource, DataConfig
from data_pipeline.preprocess.bad_share import NO_LOSS
from data_pipeline.preprocess.unit_record import UnitRecord
from data_pipeline.shards.split import SplitPlan, position, text_digest
from data_pipeline.sources.files import one_line
from data_pipeline.sources.interface import (
    Document,
    LeftOut,
    ReadContext,
    Source,
    Unit,
    open_source,
)
from pretrain.core.errors import DataError
from pretrain.core.progress import current_tally
from pretrain.core.registry import kind_name

# What is read is counted for the progress bar so often: seldom enough to cost nothing.
TALLIED_DOCUMENTS = 1 << 8
TALLIED_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Task:
    """The settings that all units of a build share; small, since it is sent with each.

    Attributes:
        workspace: the staging folder, which holds the tokenizer too.
        tokenizer_sha256: of the tokenizer in the workspace.
        engine: that encodes.
        sample_shares: of each source's text that the training of a tokenizer looks at.
        sample_limits: bytes of each source's units after which the sampling of a unit ends.
        held_out_only: write this many documents of the validation split and nothing else.
    """

    config: DataConfig
    workspace: str
    split: SplitPlan
    tokenizer_sha256: str = ""
    engine: str = "tokenizers"
    sample_shares: dict[str, float] = field(default_factory=dict)
    sample_limits: dict[str, int] = field(default_factory=dict)
    held_out_only: int | None = None


@dataclass
class Counters:
    """Counts of a unit's records, by outcome and reason."""

    records: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    edits: Counter[str] = field(default_factory=Counter)


class Reader:
    """The clean documents of one unit, with everything else counted and reported.

    Attributes:
        checksum: over every document that was read, its text's digest and the name that decides its
            side if its text does not, in order; complete once there is a record.
        lowest, highest: places of the documents whose side a hash decides.
        record_number: of the record that was read last, from 0 in the unit.

    Args:
        first: record to begin with; what is before it is not cleaned.
        part: of how many equal parts of the unit: this reader sees every record whose number has
            this remainder.
        source: to read with, where several readers are open at the same time.
    """

    def __init__(
        self,
        task: Task,
        number: int,
        unit: Unit,
        report: TextIO | None,
        *,
        first: int = 0,
        part: tuple[int, int] = (0, 1),
        source: Source | None = None,
    ) -> None:
        config = task.config
        self.task = task
        self.number = number
        self.unit = unit
        self.report = report
        self.section = config.named_sources[unit.source]
        self.source = source or _source(
            self.section.model_dump_json(), ReadContext.of(config, unit.source, task.workspace)
        )
        self.first = first
        self.part = part
        self.record_number = first
        self.cleaner = _cleaner(config.cleaning)
        self.fixed_place = {"train": 1.0, "validation": -1.0}.get(self.section.split)
        self.counters = Counters()
        self.checksum = hashlib.sha256()
        self._unhashed = bytearray()
        self.documents = 0
        self.hashed = 0
        self._bad_bytes = self._bad_without_size = 0
        self._bad_examples: dict[str, str] = {}
        # Beyond every place, until a hash has decided.
        self.lowest = 2.0
        self.highest = -1.0

    def documents_with_split(self) -> Iterator[tuple[Document, int, float]]:
        """Yield each clean document, the digest of its text, and its place in [0, 1) for the split.

        A document of a fixed split is at an end of the range.
        """
        counters = self.counters
        unhashed = self._unhashed
        cleaner = self.cleaner
        fixed_place = self.fixed_place
        source, unit = self.source, self.unit
        # A call for each of many short records costs more than its work: the usual case is known
        # before the loop, and checksums are taken of many digests at once.
        by_text = fixed_place is not None or (
            type(source).split_name is Source.split_name and source.context.split_by == "content"
        )
        tally = current_tally()
        documents = 0
        characters = 0
        # One source object reads many units; remarks are counted for each.
        self.source.notes.clear()
        for result in self._results():
            counters.records += 1
            if documents == TALLIED_DOCUMENTS or characters >= TALLIED_CHARACTERS:
                tally.add(documents, characters)
                documents = characters = 0
                self._hash()
            if isinstance(result, LeftOut):
                self._leave_out(result)
                continue
            documents = documents + 1
            characters = characters + len(result.text)
            digest = text_digest(result.text)
            name = None if by_text else source.split_name(result, unit)
            # The NUL ends the name, which cannot hold one.
            unhashed += digest.to_bytes(16, "little")
            unhashed += b"\0" if name is None else name.encode("utf-8") + b"\0"
            if cleaner is not None:
                try:
                    cleaned = cleaner.clean(result.text)
                except Exception as error:
                    error.add_note(f"at {result.id} of the source '{self.unit.source}'")
                    raise
                if cleaned.edits:
                    counters.edits.update(cleaned.edits)
                if cleaned.dropped is not None:
                    self._drop(result, cleaned.dropped, cleaned.detail)
                    continue
                if cleaned.text is not result.text:
                    result = result._replace(text=cleaned.text)
                    digest = text_digest(cleaned.text)
            # Texts that cleaning makes equal are on one side.
            if fixed_place is None:
                place = position(digest, name)
                self.hashed += 1
                if place < self.lowest:
                    self.lowest = place
                if place > self.highest:
                    self.highest = place
            else:
                place = fixed_place
            yield result, digest, place
            self.documents += 1
        tally.add(documents, characters)

    def _results(self) -> Iterator[Document | LeftOut]:
        """Yield what the source reads, which may be a plugin's."""
        remainder, parts = self.part
        try:
            results = (
                self.source.read_from(self.unit, self.first)
                if self.first
                else self.source.read(self.unit)
            )
            for number, result in enumerate(results, self.first):
                if parts > 1 and number % parts != remainder:
                    continue
                self.record_number = number
                if not isinstance(result, (Document, LeftOut)):
                    raise TypeError(
                        f"the source kind '{kind_name(type(self.section))}' yields {result!r:.200}:"
                        " yield a Document or a LeftOut"
                    )
                yield result
        except Exception as error:
            error.add_note(f"in {self.unit.files[0]} of the source '{self.unit.source}'")
            raise

    def _hash(self) -> None:
        self.checksum.update(self._unhashed)
        self._unhashed.clear()

    def _leave_out(self, record: LeftOut) -> None:
        # What a source leaves out on purpose does not count against max_bad_share.
        (self.counters.bad if record.is_bad else self.counters.left_out)[record.reason] += 1
        if record.is_bad and record.reason not in NO_LOSS:
            self._bad_bytes += record.size or 0
            self._bad_without_size += record.size is None
            place = record.path + (
                f" line {record.line:,}" if record.line is not None and not self.unit.start else ""
            )
            self._bad_examples.setdefault(
                record.reason, f"{place} {one_line(record.detail)}".rstrip()
            )
        if record.is_bad and self.task.config.on_bad == "fail":
            place = "".join(
                f", {name} {value}"
                for name, value in (("record", self.counters.records), ("byte", record.offset))
                if value is not None
            )
            raise DataError(
                f"{record.path}{place}: {record.reason} {record.detail}".rstrip()
                + ": correct it, or pass --on-bad skip to leave it out"
            )
        if record.is_bad:
            where = {"path": record.path, "line": record.line, "byte": record.offset}
            self._write({"bad": True, **where, "reason": record.reason, "detail": record.detail})
        else:
            self._write({"document": record.path, "reason": record.reason, "detail": record.detail})

    def _drop(self, document: Document, reason: str, detail: str) -> None:
        self.counters.dropped[reason] += 1
        self._write(
            {"document": document.id, "reason": reason, "detail": detail}
            | ({"metadata": document.metadata} if document.metadata else {})
        )

    def _write(self, row: Mapping[str, object]) -> None:
        if self.report is not None:
            self.report.write(
                json.dumps(row, ensure_ascii=False, default=str)
                # A path of undecodable bytes has surrogates, which UTF-8 cannot hold.
                .encode("utf-8", "replace")
                .decode("utf-8")
                + "\n"
            )

    def record(self) -> UnitRecord:
        """Return the counts of this unit, without what is only known of an encoded one."""
        counters = self.counters
        self._hash()
        # Of all records up to the last one: parts of a unit, and a reader that began in its middle,
        # see fewer.
        of_average_size = self._bad_without_size * self.unit.size // (self.record_number + 1)
        return UnitRecord(
            unit=self.number,
            source=self.unit.source,
            lines=self.source.lines_read,
            records=counters.records,
            documents=self.documents,
            hashed=self.hashed,
            checksum=self.checksum.hexdigest(),
            lowest=self.lowest if self.hashed else None,
            highest=self.highest if self.hashed else None,
            bad=dict(counters.bad),
            left_out=dict(counters.left_out),
            dropped=dict(counters.dropped),
            edits=dict(counters.edits),
            notes={note: count for note, count in self.source.notes.items() if count},
            bad_bytes=self._bad_bytes + of_average_size,
            bad_examples=self._bad_examples,
        )


@lru_cache(maxsize=16)
def _source(section: str, context: ReadContext) -> Source:
    """Return one object for all units of a source that this process reads.

    Some sources keep what was slow to open.
    """
    return open_source(TypeAdapter(AnySource).validate_json(section), context)


def _cleaner(config: Cleaning) -> Cleaner | None:
    return _cached_cleaner(config.model_dump_json())


@lru_cache(maxsize=1)
def _cached_cleaner(config: str) -> Cleaner | None:
    cleaner = Cleaner(Cleaning.model_validate_json(config))
    return cleaner if cleaner.is_needed else None
