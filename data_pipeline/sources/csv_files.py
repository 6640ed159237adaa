"""Comma-separated values with a header line (RFC 4180)."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from data_pipeline.sources.files import DAMAGED_STREAM, Line, damaged, open_stream, read_lines, stamp_of
from data_pipeline.sources.folders import files_of
from data_pipeline.sources.interface import Document, LeftOut, Source, Unit
from data_pipeline.sources.records import RecordReader, check_first_file, listed, suggestion
from pretrain.config.data_schema import CsvSource
from pretrain.config.errors import DataError


class Csv(Source[CsvSource]):
    """A file is one unit: a quoted value may hold line ends, so no line is sure to begin a record."""

    def units(self, unit_bytes: int) -> list[Unit]:
        units = []
        for path in files_of(self.config):
            size, stamp = stamp_of(path)
            units.append(Unit(self.context.name, (path,), size=size, stamp=stamp))
        check_first_file(self, units)
        return units

    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        path, longest = unit.files[0], self.context.max_record_bytes
        csv.field_size_limit(max(csv.field_size_limit(), longest))
        self.lines_read = 0
        with open_stream(path) as stream:
            feed = _Feed(read_lines(stream, 0, None, longest), longest)
            try:
                yield from self._records(path, feed)
            except DAMAGED_STREAM as error:
                yield damaged(path, feed.number + 1, error)
            finally:
                self.lines_read = feed.number

    def _records(self, path: str, feed: _Feed) -> Iterator[Document | LeftOut]:
        rows = csv.reader(feed, delimiter=self.config.delimiter)
        header: list[str] | None = None
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
                fault = ("invalid_csv", str(error))
            except _TooLong:
                feed.skip_record()
                fault = ("too_long", f"longer than {self.context.max_record_bytes} bytes")
            else:
                if header is None:
                    header = self._checked(values, path) if values else None
                    continue
                if not values:  # a blank line
                    continue
                fault = self._fault(len(values), len(header), feed)
            if header is None:
                raise DataError(f"the header line of {path} cannot be read ({fault and fault[1]}): write the names of the columns there")
            result = fault or to_document(dict(zip(header, values)), f"{path}:{feed.offset}")
            yield result if isinstance(result, Document) else LeftOut(path, _renamed(result[0]), feed.line, feed.offset, result[1])

    def _fault(self, values: int, names: int, feed: _Feed) -> tuple[str, str] | None:
        if feed.is_cut_short:
            return "invalid_csv", "a quote that is never closed"
        return None if values == names else ("field_count", f"{values} values, and the header has {names} names")

    def _checked(self, header: list[str], path: str) -> list[str]:
        for wanted in (self.config.text_field, self.config.id_field, *self.config.metadata_fields):
            if wanted is not None and header.count(wanted) != 1:
                problem = "two columns" if wanted in header else "no column"
                probable = suggestion(wanted, header)
                advice = f", perhaps --text-field {probable}" if probable and wanted == self.config.text_field != probable else ""
                raise DataError(f"{path} has {problem} '{wanted}' (it has {listed(header)}): check text_field, id_field and delimiter{advice}")
        return header


def _renamed(reason: str) -> str:
    # Only bytes that are not UTF-8 become surrogates when a line is decoded.
    return "invalid_utf8" if reason == "lone_surrogate" else reason


class _TooLong(Exception):
    """The record at hand passed the limit."""


class _Feed:
    """Lines for csv.reader, which remembers where the record at hand began and refuses to let it grow without bound.

    Attributes:
        number: lines given so far.
        line, offset: where the record at hand began.
        is_cut_short: the file ended inside the record's quotes.
    """

    def __init__(self, lines: Iterator[Line], longest: int) -> None:
        self._lines, self._longest = lines, longest
        self.number = self.line = self.offset = 0
        self.is_cut_short = False
        self.begin_record()

    def begin_record(self) -> None:
        self._size, self._quoted = 0, False
        self._last: bytes | None = None

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        self._quoted = self._size > 0  # a reader that asks on inside a record is inside quotes
        line = next(self._lines, None)
        if line is None:
            self.is_cut_short = self._quoted
            raise StopIteration
        self.number = line.number
        if not self._quoted:
            self.line, self.offset = line.number, line.offset
        self._last = line.content
        if line.content is None or self._size + len(line.content) > self._longest:
            raise _TooLong
        self._size += len(line.content) + 1
        return line.content.decode("utf-8", "surrogateescape") + "\n"

    def skip_record(self) -> None:
        """Passes over the rest of a record that is too long: where it is inside quotes, up to the line that closes them."""
        if not self._quoted:
            return
        content = self._last
        # Doubled quotes stand for one inside a value, so an odd number of them on a line closes the value.
        while content is not None and content.count(b'"') % 2 == 0:
            line = next(self._lines, None)
            if line is None:
                return
            self.number, content = line.number, line.content
