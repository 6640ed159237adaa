"""Text files: a document is a file, a line, or what stands between two separator lines."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from data_pipeline.sources.files import (
    BYTE_ORDER_MARK,
    DAMAGED_STREAM,
    damaged,
    grouped_units,
    list_files,
    open_stream,
    range_units,
    read_lines,
)
from data_pipeline.sources.interface import Document, LeftOut, ReadContext, Source, Unit
from data_pipeline.sources.jsonl import text_fault
from pretrain.config.data_schema import TextSource
from pretrain.config.errors import ConfigError


class Text(Source[TextSource]):
    """A file's own line ends are kept, so that bits per byte are counted over the bytes that are there."""

    def __init__(self, config: TextSource, context: ReadContext) -> None:
        super().__init__(config, context)
        try:
            codecs.lookup(config.encoding)
        except LookupError:
            raise ConfigError(f"data.source.encoding: Python knows no encoding '{config.encoding}': use utf-8, latin-1, utf-16 ...") from None
        if config.document != "file" and "\n".encode(config.encoding) != b"\n":
            raise ConfigError(
                f"data.source.encoding: lines of {config.encoding} text cannot be told apart by bytes: use document=file, or convert it"
            )

    def units(self, unit_bytes: int) -> list[Unit]:
        files = list_files(self.config.input)
        cut = range_units if self.config.document == "line" else grouped_units
        return cut(self.context.name, files, unit_bytes)

    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        self.lines_read = 0
        for path in unit.files:
            with open_stream(path) as stream:
                try:
                    match self.config.document:
                        case "file":
                            yield self._whole(path, stream)
                        case "line":
                            yield from self._by_line(path, stream, unit)
                        case "separator":
                            yield from self._by_separator(path, stream)
                except DAMAGED_STREAM as error:
                    yield damaged(path, self.lines_read, error)

    def _whole(self, path: str, stream: BinaryIO) -> Document | LeftOut:
        longest = self.context.max_record_bytes
        content = stream.read(longest + 1)
        if len(content) > longest:
            return LeftOut(path, "too_long", None, None, f"longer than {longest} bytes")
        return self._document(content, path, path, None, None)

    def _by_line(self, path: str, stream: BinaryIO, unit: Unit) -> Iterator[Document | LeftOut]:
        for line in read_lines(stream, unit.start, unit.end, self.context.max_record_bytes):
            self.lines_read = line.number
            content = None if line.content is None else line.content.removesuffix(b"\r")
            if content is None or content.strip():
                yield self._part(content, path, line.number, line.offset)

    def _by_separator(self, path: str, stream: BinaryIO) -> Iterator[Document | LeftOut]:
        assert self.config.separator is not None
        separator, longest = self.config.separator.encode(self.config.encoding), self.context.max_record_bytes
        part: list[bytes] = []
        size, first = 0, (1, 0)
        for line in read_lines(stream, 0, None, longest):
            self.lines_read = line.number
            if line.content is not None and line.content.removesuffix(b"\r") == separator:
                if size:
                    yield self._part(None if size > longest else b"".join(part), path, *first)
                part, size, first = [], 0, (line.number + 1, line.offset + len(line.content) + 1)
                continue
            size += longest + 1 if line.content is None else len(line.content) + 1
            if size > longest:
                part.clear()
            else:
                part += [line.content or b"", b"\n"]
        if size:
            yield self._part(None if size > longest else b"".join(part), path, *first)

    def _part(self, content: bytes | None, path: str, line: int, offset: int) -> Document | LeftOut:
        """The document that begins on this line; ``content`` is None where it is too long."""
        if content is None:
            return LeftOut(path, "too_long", line, offset, f"longer than {self.context.max_record_bytes} bytes")
        return self._document(content, f"{path}:{offset}", path, line, offset)

    def _document(self, content: bytes, name: str, path: str, line: int | None, offset: int | None) -> Document | LeftOut:
        encoding = self.config.encoding
        try:
            # An encoding with a byte order mark of its own takes it away itself.
            text = content.removeprefix(BYTE_ORDER_MARK if offset is None and codecs.lookup(encoding).name == "utf-8" else b"").decode(encoding)
        except UnicodeError as error:
            position = f"byte {error.start}" if isinstance(error, UnicodeDecodeError) else "its end"
            reason = "invalid_utf8" if codecs.lookup(encoding).name == "utf-8" else "undecodable"
            return LeftOut(path, reason, line, offset, f"not {encoding} at {position}; another encoding is named with data.source.encoding")
        fault = text_fault(text, "text")
        return LeftOut(path, fault[0], line, offset, fault[1]) if fault else Document(text, name, file=path)
