"""The interface of a source: it lists its units of work, and reads one."""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, TypeVar

from data_pipeline.config import DataConfig
from data_pipeline.sources.config import SourceConfig, SplitBy
from pretrain.core.errors import ConfigError, DataError
from pretrain.core.files import JsonObject
from pretrain.core.registry import kinds_of

ConfigT = TypeVar("ConfigT", bound=SourceConfig)

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Waits between the attempts at a hub that does not deliver.
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0

# The reasons for which a record becomes no document. Reports count these words, and
# bad_records.jsonl names one for each record.
REASONS = {
    "too_long": "longer than data.max_record_bytes",
    "empty": "nothing but white space",
    "nul": "holds the character NUL",
    "invalid_utf8": (
        "its bytes are not UTF-8, or not the encoding that is named or that the file's byte order"
        " mark stands for"
    ),
    "undecodable": "its bytes are not in the encoding that was named, or its value cannot be shown",
    "lone_surrogate": "holds half of a UTF-16 pair, which no UTF-8 can",
    "invalid_json": "not JSON",
    "too_deep": "JSON that is nested too deeply",
    "not_an_object": "JSON, but no object",
    "missing_field": "the text field is not there, or null",
    "not_a_string": "the text field is no text",
    "bad_id": "the id field is no text and no whole number",
    "field_count": "more or fewer values than the CSV header has names",
    "invalid_csv": "a line that the CSV rules do not allow",
    "repeated_header": "a row that says the CSV header again",
    "damaged_compression": "the rest of a compressed file that is cut short or damaged",
    "damaged_file": "rows of a Parquet or Arrow file that cannot be read",
    "binary": "a file with NUL bytes among source code",
    "too_large": "a file above max_file_bytes among source code",
    "git_lfs_pointer": (
        "among source code, what git keeps in place of a file that 'git lfs pull' would fetch"
    ),
}


# What may look odd about a document without being an error.
NOTES = {
    "value_over_many_lines": "a CSV value over so many lines that a stray quote may have opened it"
}


class Document(NamedTuple):
    """One text.

    Attributes:
        text: not empty, without NUL and without lone surrogates.
        id: where it came from, for reports: a path, path:offset, or the record's own id.
        key: the record's own id, of the recipe's id_field.
        metadata: the fields that the recipe asks for.
        file: that it was read from, if its unit has several.
    """

    text: str
    id: str
    key: str | None = None
    metadata: JsonObject | None = None
    file: str | None = None


class LeftOut(NamedTuple):
    """A record that gives no document.

    Attributes:
        path: its file.
        reason: a key of ``REASONS``, or of the kind's own ``reasons``.
        line: from 1, counted from the start of the unit; None if a file has no lines.
        offset: of its first byte in the (decompressed) file; None if that means nothing.
        detail: what exactly is wrong, for bad_records.jsonl.
        is_bad: false for what a rule of the source leaves out on purpose, such as a binary file
            among source code.
        size: about how many bytes of the file are lost with it; None: the average size of a
            record of its unit.
    """

    path: str
    reason: str
    line: int | None = None
    offset: int | None = None
    detail: str = ""
    is_bad: bool = True
    size: int | None = None


@dataclass(frozen=True)
class Unit:
    """A part of a source that one worker reads in one go.

    It is a byte range, a range of rows, a whole file or several small ones.

    Attributes:
        source: the source's name in the recipe.
        files: paths, or the data set's name.
        start, end: the range inside the only file; None: to the end.
        size: about the bytes that will be read, for progress and balance.
        stamp: changes when the content may have changed; from sizes and times, or a revision.
    """

    source: str
    files: tuple[str, ...]
    start: int = 0
    end: int | None = None
    size: int = 0
    stamp: str = ""


@dataclass(frozen=True)
class Patience:
    """How long a hub that does not reply is waited for.

    Attributes:
        retries: after a failure, one after the other, without a row in between.
        timeout_seconds: without a byte, after which a request has failed.
    """

    retries: int = 6
    timeout_seconds: float = 30.0

    def waits(self) -> Iterator[float]:
        """Seconds to wait before each retry: 1, 2, 4, ... up to a minute."""
        for number in range(self.retries):
            yield min(FIRST_WAIT_SECONDS * 2.0**number, LONGEST_WAIT_SECONDS)


@dataclass(frozen=True)
class ReadContext:
    """The settings that a source needs in addition to its own section.

    Attributes:
        name: the source's name in the recipe.
        max_record_bytes: longer records are left out as ``too_long``, without ever being held in
            memory.
        spool: a file that keeps what can be read only once.
        split_by, split_root: the fields of the data section; a source that cannot be split so is
        refused.
        patience: with a hub that does not deliver.
    """

    name: str
    max_record_bytes: int = 256 << 20
    spool: str | None = None
    split_by: SplitBy = "content"
    split_root: str | None = None
    patience: Patience = Patience()

    @classmethod
    def of(
        cls, config: DataConfig, name: str, spool_folder: str | Path | None = None
    ) -> ReadContext:
        """Return the settings for the source ``name`` of a recipe."""
        spool = None if spool_folder is None else str(Path(spool_folder) / f"input-{name}")
        patience = Patience(config.streaming_retries, config.streaming_timeout_seconds)
        return cls(
            name, config.max_record_bytes, spool, config.split_by, config.split_root, patience
        )


class Source(ABC, Generic[ConfigT]):
    """A source of documents.

    Constructing one is cheap: files are listed by :meth:`units`, in the coordinator only.

    Attributes:
        lines_read: lines of the unit that was read last, so that the next unit of the same file can
            number its own.
        notes: what in the documents of that unit is worth a look, counted by a key of ``NOTES`` or
            of the kind's own ``notes``; the reader clears it before each unit.
        revision: the version of what was read, once the units are listed; None for sources that
            have none.
        has_files: its documents are in files that have paths.
        has_ids: it fills ``Document.key`` without the section's ``id_field``.

    Raises:
        ConfigError: if its documents have no path or id, and that is what the split is made by.
    """

    has_files: ClassVar[bool] = True
    has_ids: ClassVar[bool] = False

    def __init__(self, config: ConfigT, context: ReadContext) -> None:
        self.config = config
        self.context = context
        self.lines_read = 0
        self.revision: str | None = None
        self.notes: Counter[str] = Counter()
        if config.split == "hash":
            self._check_split()

    @abstractmethod
    def units(self, unit_bytes: int) -> list[Unit]:
        """Return all units in the order of the output, as a function of the input alone.

        Each has about ``unit_bytes`` if the format can be cut.

        Raises:
            DataError: if there is nothing to read.
        """

    @abstractmethod
    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        """The documents of a unit in their order, and what is left out.

        Raises:
            DataError: for a file that is gone or cannot be read at all.
        """

    def read_from(self, unit: Unit, first: int) -> Iterator[Document | LeftOut]:
        """The results of :meth:`read` from number ``first`` (from 0) on.

        A kind that can begin in the middle of a unit overrides it.
        """
        return itertools.islice(self.read(unit), first, None)

    def split_name(self, document: Document, unit: Unit) -> str | None:
        """Return the path or id that decides on which side a document is; None if its text does.

        Raises:
            DataError: for a file outside ``split_root``.
        """
        match self.context.split_by:
            case "content":
                return None
            case "id":
                return document.key
            case "path":
                return self.path_of(document.file or unit.files[0])

    def path_of(self, file: str) -> str:
        """A file's path, the same however it is named and wherever the command runs."""
        return real_path(file, self.context.split_root)

    def _check_split(self) -> None:
        place = f"data.split_by is {self.context.split_by}, and the source '{self.context.name}'"
        by = self.context.split_by
        if by == "path" and not self.has_files:
            raise ConfigError(f"{place} has no files with paths: split by content, or by id")
        if by == "id" and not self.has_ids and getattr(self.config, "id_field", None) is None:
            raise ConfigError(
                f"{place} has no id_field: name the field of its records that holds the id, or"
                " split by content"
            )


def open_source(config: SourceConfig, context: ReadContext) -> Source:
    """Return the source that a section of the recipe describes; nothing is read yet."""
    source: Source = config.implementing_class()(config, context)
    return source


def meaning_of_reasons() -> dict[str, str]:
    """Return what each reason for a left-out record means, those of plugins' sources included.

    A plugin describes its own words, and none of this project's.
    """
    ours = {key: text for kind in kinds_of(SourceConfig) for key, text in kind.reasons.items()}
    return ours | REASONS


def meaning_of_notes() -> dict[str, str]:
    """Return what each remark about documents means, those of plugins' sources included."""
    ours = {key: text for kind in kinds_of(SourceConfig) for key, text in kind.notes.items()}
    return ours | NOTES


@lru_cache(maxsize=4096)
def real_path(file: str, root: str | None) -> str:
    """Return a file's path from ``root`` on, or from the root of the disk.

    Links, ``.`` and ``..`` are resolved.

    Raises:
        DataError: for a file outside the root.
    """
    real = Path(os.path.realpath(file))
    if root is None:
        return real.as_posix()
    folder = Path(os.path.realpath(os.path.expanduser(root)))
    if not real.is_relative_to(folder):
        place = file if os.path.abspath(file) == str(real) else f"{file}, a link to {real},"
        raise DataError(
            f"{place} is outside data.split_root ({folder}), so it has no path to split by: name a"
            " folder that all files are in"
        )
    return real.relative_to(folder).as_posix()
