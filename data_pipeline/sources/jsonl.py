"""JSON: an object a line, an array of objects, or objects one after the other."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from typing import Any

import orjson

from data_pipeline.sources.config import JsonlSource
from data_pipeline.sources.containers import (
    HEAD_BYTES,
    DamagedStream,
    Peekable,
    Stream,
    checked_encoding,
    stored_bytes,
)
from data_pipeline.sources.files import (
    Line,
    damaged,
    file_kind,
    open_stream,
    range_units,
    read_lines,
    whole_unit,
)
from data_pipeline.sources.folders import files_of
from data_pipeline.sources.interface import Document, LeftOut, Source, Unit
from data_pipeline.sources.json_values import Value, ValueReader, holds_lines
from data_pipeline.sources.records import RecordReader, check_first_file
from pretrain.core.errors import DataError

Fault = tuple[str, str]  # reason and detail
Parsed = tuple[Line | Value, Any, Fault | None]


class Jsonl(Source[JsonlSource]):
    """Files of JSON values.

    Byte ranges of plain files with a value a line are read in parallel; every other file is one
    unit, read as a stream.
    """

    def units(self, unit_bytes: int) -> list[Unit]:
        is_utf8 = checked_encoding(self.config.encoding) == "utf-8"
        units: list[Unit] = []
        for path in files_of(self.config):
            in_ranges = file_kind(path).is_plain and is_utf8
            if in_ranges:
                with open_stream(path) as stream:
                    in_ranges = _holds_lines(Peekable(stream))
            units += (
                range_units(self.context.name, path, unit_bytes)
                if in_ranges
                else [whole_unit(self.context.name, path)]
            )
        check_first_file(self, units)
        return units

    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        """Yield the documents of a unit.

        Raises:
            DataError: for a file that is one object around its records.
        """
        path = unit.files[0]
        to_document = RecordReader(self.config)
        self.lines_read = count = 0
        around: str | None = None
        with open_stream(path, self.config.encoding) as stream:
            stream = Peekable(stream) if unit.end is None else stream
            try:
                for value, record, fault in self._parsed(stream, unit):
                    count += 1
                    result = fault or to_document(record, f"{path}:{value.offset}")
                    if isinstance(result, Document):
                        yield result
                        continue
                    if (
                        count == 1
                        and unit.start == 0
                        and (
                            unit.end is None
                            or value.offset + value.size + 1 >= os.path.getsize(path)
                        )
                    ):
                        around = list_inside(record)  # of a file's only value
                    yield LeftOut(
                        path,
                        result[0],
                        value.number,
                        value.offset,
                        result[1],
                        size=stored_bytes(stream, value.size),
                    )
            except DamagedStream as error:
                yield damaged(path, self.lines_read + 1, error)
        if count == 1 and around is not None:
            raise DataError(
                f"{path} is one object, which holds a list in '{around}': write the records of the"
                f" list alone, such as with jq -c '.[\"{around}\"][]', or name the text with"
                " text_field"
            )

    def _parsed(self, stream: Stream, unit: Unit) -> Iterator[Parsed]:
        longest = self.context.max_record_bytes
        too_long = "too_long", f"longer than {longest} bytes"
        if isinstance(stream, Peekable) and not _holds_lines(stream):
            reader = ValueReader(stream, longest)
            for value in reader:
                self.lines_read = reader.line
                if value.content is not None:
                    yield value, *parse_object(value.content)
                else:
                    yield value, None, ("invalid_json", value.fault) if value.fault else too_long
            return
        for line in read_lines(stream, unit.start, unit.end, longest):
            self.lines_read = line.number
            content = line.content
            if content is None:
                yield line, None, too_long
                continue
            try:
                yield line, orjson.loads(content), None
            except orjson.JSONDecodeError:
                if content and not content.isspace():
                    yield from values_of_line(line, content)


def _holds_lines(stream: Peekable) -> bool:
    head = stream.peek(HEAD_BYTES)
    return holds_lines(head, len(head) < HEAD_BYTES)


def values_of_line(line: Line, content: bytes) -> list[Parsed]:
    """Return what a line holds that is not one JSON value.

    That is several values, or one with a comma behind it; for anything else, what is wrong with it.
    """
    record, fault = parse_object(content)
    if fault is None or fault[0] != "invalid_json":
        return [(line, record, fault)]
    values = [
        value._replace(number=line.number, offset=line.offset + value.offset)
        for value in ValueReader(io.BytesIO(content), len(content))
    ]
    parsed: list[Parsed] = [(value, *parse_object(value.content or b"")) for value in values]
    return [(line, None, fault)] if any(part[2] for part in parsed) else parsed


def list_inside(record: Any) -> str | None:
    """The name of a record's first list of objects."""
    fields = record.items() if isinstance(record, dict) else ()
    return next(
        (
            name
            for name, value in fields
            if isinstance(value, list) and value and isinstance(value[0], dict)
        ),
        None,
    )


def parse_object(content: bytes) -> tuple[Any, Fault | None]:
    """The JSON value of a line, or the reason and the detail of why there is none."""
    try:
        return orjson.loads(content), None
    except orjson.JSONDecodeError as strict:
        # NaN, as Python writes it, is no JSON, but the text of the same record may be good.
        try:
            return json.loads(content.decode("utf-8")), None
        except UnicodeDecodeError as error:
            return None, (
                "invalid_utf8",
                f"at byte {error.start} of the line; another encoding is named with --encoding",
            )
        except RecursionError:
            return None, ("too_deep", "nested too deeply")
        except ValueError:
            return None, ("invalid_json", str(strict)[:200])
