"""JSON lines: one object a line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

import orjson

from data_pipeline.sources.files import DAMAGED_STREAM, damaged, list_files, open_stream, range_units, read_lines
from data_pipeline.sources.interface import Document, LeftOut, Source, Unit
from pretrain.config.data_schema import JsonlSource, RecordsBase


class Jsonl(Source[JsonlSource]):
    """Byte ranges of plain files are read in parallel; a compressed file is one unit."""

    def units(self, unit_bytes: int) -> list[Unit]:
        return range_units(self.context.name, list_files(self.config.input), unit_bytes)

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


class RecordReader:
    """From a parsed record to a document, or to (reason, detail). Where records are not ``nested``, a dot is a part of a field's name."""

    def __init__(self, config: RecordsBase, nested: bool = True) -> None:
        self.text, *metadata = [name.split(".") if nested else [name] for name in (config.text_field, *config.metadata_fields)]
        self.id = None if config.id_field is None else config.id_field.split(".") if nested else [config.id_field]
        self.metadata = dict(zip(config.metadata_fields, metadata))
        self._plain = self.text[0] if len(self.text) == 1 and not self.id and not self.metadata else None

    def __call__(self, record: Any, place: str) -> Document | tuple[str, str]:
        if not isinstance(record, dict):
            return "not_an_object", f"it is a {type(record).__name__}"
        text = record.get(self._plain) if self._plain else reach(record, self.text)
        fault = text_fault(text, ".".join(self.text))
        if fault:
            return fault
        assert isinstance(text, str)
        if self._plain:
            return Document(text, place)
        key = None
        if self.id:
            value = reach(record, self.id)
            if not isinstance(value, str | int) or isinstance(value, bool) or text_fault(str(value), "id"):
                return "bad_id", f"'{'.'.join(self.id)}' is no text and no whole number"
            key = str(value)
        return Document(text, key or place, key, {name: reach(record, path) for name, path in self.metadata.items()} or None)


def reach(record: Any, path: list[str]) -> Any:
    """The value at the end of a path of field names; None where a part of it is not there."""
    for name in path:
        record = record.get(name) if isinstance(record, dict) else None
    return record


def text_fault(text: Any, field_name: str) -> tuple[str, str] | None:
    """Why a value cannot be a document's text: (reason, detail), or None where it can."""
    if not isinstance(text, str):
        return ("missing_field", f"no '{field_name}'") if text is None else ("not_a_string", f"'{field_name}' is a {type(text).__name__}")
    if not text or text.isspace():
        return "empty", ""
    try:
        # A text keeps the UTF-8 that this makes of it: it is encoded once, and not again for its digest, its size and the engine.
        has_nul = "\0" in text if text.isascii() else b"\0" in codecs.readbuffer_encode(text)[0]
    except UnicodeEncodeError as error:
        return "lone_surrogate", f"half of a UTF-16 pair at character {error.start}"
    return ("nul", f"at character {text.index(chr(0))}") if has_nul else None
