"""JSON lines: one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import orjson

from data_pipeline.sources.files import DAMAGED_STREAM, damaged, open_stream, range_units, read_lines
from data_pipeline.sources.folders import files_of
from data_pipeline.sources.interface import Document, LeftOut, Source, Unit
from data_pipeline.sources.records import RecordReader, check_first_file
from pretrain.config.data_schema import JsonlSource


class Jsonl(Source[JsonlSource]):
    """Byte ranges of plain files are read in parallel; a compressed file is one unit."""

    def units(self, unit_bytes: int) -> list[Unit]:
        units = range_units(self.context.name, files_of(self.config), unit_bytes)
        check_first_file(self, units)
        return units

    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        path, longest = unit.files[0], self.context.max_record_bytes
        to_document = RecordReader(self.config)
        self.lines_read = 0
        with open_stream(path) as stream:
            try:
                for number, offset, content in read_lines(stream, unit.start, unit.end, longest):
                    self.lines_read = number
                    if content is None:
                        yield LeftOut(path, "too_long", number, offset, f"longer than {longest} bytes")
                        continue
                    if not content or content.isspace():
                        continue
                    record, fault = parse_object(content)
                    result = fault or to_document(record, f"{path}:{offset}")
                    yield result if isinstance(result, Document) else LeftOut(path, result[0], number, offset, result[1])
            except DAMAGED_STREAM as error:
                yield damaged(path, self.lines_read + 1, error)


def parse_object(content: bytes) -> tuple[Any, tuple[str, str] | None]:
    """The JSON value of a line, or the reason and the detail of why there is none."""
    try:
        return orjson.loads(content), None
    except orjson.JSONDecodeError as strict:
        # NaN, as Python writes it, is no JSON, but what it stands beside may be a good text.
        try:
            return json.loads(content.decode("utf-8")), None
        except UnicodeDecodeError as error:
            return None, ("invalid_utf8", f"at byte {error.start} of the line")
        except RecursionError:
            return None, ("too_deep", "nested too deeply")
        except ValueError:
            return None, ("invalid_json", str(strict)[:200])
