"""Rows of values with a header line: comma-separated (RFC 4180), or with another delimiter."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator

from data_pipeline.sources.config import CsvSource
from data_pipeline.sources.containers import (
    HEAD_BYTES,
    DamagedStream,
    Peekable,
    Stream,
    checked_encoding,
    stored_bytes,
    with_line_feeds,
)
from data_pipeline.sources.files import (
    Line,
    damaged,
    file_kind,
    one_line,
    open_stream,
    read_lines,
    whole_unit,
)
from data_pipeline.sources.folders import files_of
from data_pipeline.sources.interface import BYTE_ORDER_MARK, Document, LeftOut, Source, Unit
from data_pipeline.sources.records import RecordReader, check_first_file, listed, suggestion
from pretrain.core.errors import DataError

DELIMITERS = ",\t;|"
MANY_LINES = 100
FEW_LINES = 6


class Csv(Source[CsvSource]):
    """A file is one unit: a quoted value may hold line ends, so no line is sure to begin a record.

    A value that opens a quote and does not close it as the rules say makes its first line a bad
    record; the lines behind are read again as records of their own, so that a stray quote takes no
    other record with it.
    """

    def units(self, unit_bytes: int) -> list[Unit]:
        checked_encoding(self.config.encoding)
        paths = files_of(self.config)
        for path in paths:
            file_kind(path)  # what is no text is refused before any work
        units = [whole_unit(self.context.name, path) for path in paths]
        check_first_file(self, units)
        return units

    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        path = unit.files[0]
        longest = self.context.max_record_bytes
        csv.field_size_limit(max(csv.field_size_limit(), longest))
        self.lines_read = 0
        # Listing the units has looked at the first rows, and noted what is in them.
        self.notes.clear()
        with open_stream(path, self.config.encoding) as content:
            stream = Peekable(content)
            feed = _Feed(read_lines(with_line_feeds(stream), 0, None, longest), longest)
            try:
                yield from self._records(
                    path, feed, stream, self._delimiter(stream.peek(HEAD_BYTES))
                )
            except DamagedStream as error:
                yield damaged(path, feed.number + 1, error)
            finally:
                self.lines_read = feed.number

    def _delimiter(self, head: bytes) -> str:
        """Return the named delimiter, or the first that cuts the header into the wanted columns.

        Without either, it is the one that cuts the header most often.
        """
        if self.config.delimiter is not None or self.config.columns is not None:
            return self.config.delimiter or ","
        text = (
            head.removeprefix(BYTE_ORDER_MARK)
            .decode("utf-8", "replace")
            .replace("\r", "\n")
            .lstrip("\n")
            .partition("\n")[0]
        )
        headers = {
            delimiter: next(csv.reader([text], delimiter=delimiter), []) for delimiter in DELIMITERS
        }
        fitting = (
            delimiter
            for delimiter, names in headers.items()
            if all(wanted in names for wanted in self._wanted)
        )
        return next(fitting, max(headers, key=lambda delimiter: len(headers[delimiter])))

    @property
    def _wanted(self) -> list[str]:
        return [
            self.config.text_field,
            *([self.config.id_field] if self.config.id_field else []),
            *self.config.metadata_fields,
        ]

    def _records(
        self, path: str, feed: _Feed, stream: Stream, delimiter: str
    ) -> Iterator[Document | LeftOut]:
        quoting = self.config.quoting if self.config.quoting is not None else delimiter != "\t"
        rows = csv.reader(
            feed,
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
            escapechar=self.config.escape,
            strict=True,
        )
        header = None if self.config.columns is None else self._checked(self.config.columns, path)
        to_document = RecordReader(self.config)
        while True:
            feed.begin_record()
            values: list[str] = []
            fault: tuple[str, str] | None
            try:
                values = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                fault = ("invalid_csv", feed.read_again() or one_line(str(error)))
            except _TooLong:
                feed.skip_record()
                fault = ("too_long", f"longer than {self.context.max_record_bytes} bytes")
            else:
                if header is None:
                    header = self._checked(values, path) if values else None
                    continue
                if not values:  # a blank line
                    continue
                if values == header:
                    yield LeftOut(path, "repeated_header", feed.line, feed.offset, is_bad=False)
                    continue
                fault = (
                    None
                    if len(values) == len(header)
                    else (
                        "field_count",
                        f"{len(values)} values, and the header has {len(header)} names",
                    )
                )
            if header is None:
                raise DataError(
                    f"the header line of {path} cannot be read ({fault and fault[1]}): write the"
                    " names of the columns there"
                )
            result = fault or to_document(dict(zip(header, values)), f"{path}:{feed.offset}")
            if isinstance(result, Document):
                self.notes["value_over_many_lines"] += feed.looks_like_rows(delimiter, len(header))
                yield result
            else:
                reason, detail = self._of_bytes(result)
                yield LeftOut(
                    path,
                    reason,
                    feed.line,
                    feed.offset,
                    detail,
                    size=stored_bytes(stream, feed.size),
                )

    def _checked(self, header: list[str], path: str) -> list[str]:
        for wanted in self._wanted:
            if header.count(wanted) != 1:
                problem = "two columns" if wanted in header else "no column"
                probable = suggestion(wanted, header)
                advice = (
                    f", perhaps --text-field {probable}"
                    if probable and wanted == self.config.text_field != probable
                    else ""
                )
                raise DataError(
                    f"{path} has {problem} '{wanted}' (it has {listed(header)}): check text_field,"
                    " id_field and delimiter, and name the columns with 'columns' if the file has"
                    f" no header line{advice}"
                )
        return header

    def _of_bytes(self, fault: tuple[str, str]) -> tuple[str, str]:
        """Return the same fault, or that of the bytes if the value has surrogates.

        Only bytes outside the encoding become surrogates when a line is decoded.
        """
        if fault[0] != "lone_surrogate":
            return fault
        return (
            "invalid_utf8",
            (
                f"not {self.config.encoding} at character {fault[1].rpartition(' ')[2]}; another"
                " encoding is named with --encoding"
            ),
        )


class _TooLong(Exception):
    """The record at hand passed the limit."""


class _Feed:
    """Lines for csv.reader, with a limit on the size of a record.

    It remembers the lines of the current record.

    Attributes:
        number: lines given so far.
        line, offset: where the record at hand began.
        size: of its lines in bytes.
    """

    def __init__(self, lines: Iterator[Line], longest: int) -> None:
        self._lines, self._longest = lines, longest
        self._again: deque[Line] = deque()
        self._held: list[Line] = []
        self.number = self.line = self.offset = self.size = 0

    def begin_record(self) -> None:
        self._held = []
        self.size = 0

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        if not self._held:
            self.line = line.number
            self.offset = line.offset
        self._held.append(line)
        self.number = line.number
        self.size += line.size + 1
        if line.content is None or self.size > self._longest + 1:
            raise _TooLong
        return line.content.decode("utf-8", "surrogateescape") + "\n"

    def read_again(self) -> str | None:
        """Put all lines of the current record back but its first.

        Returns what is wrong with the record then; None if it has only one line.
        """
        first, *others = self._held
        self._again.extendleft(reversed(others))
        self.size = first.size + 1
        return "a quote that is not closed, or not before a delimiter" if others else None

    def looks_like_rows(self, delimiter: str, width: int) -> bool:
        """Whether the current record looks like several rows that a stray quote has joined."""
        if not FEW_LINES <= len(self._held) < MANY_LINES:
            return len(self._held) >= MANY_LINES
        inside = self._held[1:-1]
        return width > 1 and all(
            (line.content or b"").count(delimiter.encode()) == width - 1 for line in inside
        )

    def skip_record(self) -> None:
        """Skip the rest of a record that is too long.

        Inside quotes, that is up to the line that closes them.
        """
        if len(self._held) < 2:
            return
        content = self._held[-1].content
        # Doubled quotes are one quote inside a value, so an odd number of them on a line closes the
        # value.
        while content is not None and content.count(b'"') % 2 == 0:
            line = self._again.popleft() if self._again else next(self._lines, None)
            if line is None:
                return
            self.number = line.number
            self.size = self.size + line.size + 1
            content = line.content
