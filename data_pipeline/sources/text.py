"""Text files: a document is a file, a line, or the text between two separator lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

from data_pipeline.sources.config import TextSource
from data_pipeline.sources.containers import (
    HEAD_BYTES,
    DamagedStream,
    Peekable,
    Stream,
    checked_encoding,
    has_lone_returns,
    stored_bytes,
    with_line_feeds,
)
from data_pipeline.sources.files import (
    BLOCK_BYTES,
    damaged,
    file_kind,
    grouped_units,
    open_stream,
    range_units,
    read_lines,
    stamp_of,
    whole_unit,
)
from data_pipeline.sources.folders import files_of
from data_pipeline.sources.interface import (
    BYTE_ORDER_MARK,
    Document,
    LeftOut,
    ReadContext,
    Source,
    Unit,
)
from data_pipeline.sources.records import text_fault
from pretrain.core.errors import ConfigError


class Text(Source[TextSource]):
    """Text files.

    A file's own line ends are kept, so that bits per byte are counted over the bytes of the file.
    """

    def __init__(self, config: TextSource, context: ReadContext) -> None:
        super().__init__(config, context)
        self._encoding = checked_encoding(config.encoding)
        if config.document != "file" and "\n".encode(config.encoding) != b"\n":
            raise ConfigError(
                f"data.source.encoding: lines of {config.encoding} text cannot be distinguished by"
                " bytes: use document=file, or convert it"
            )

    def units(self, unit_bytes: int) -> list[Unit]:
        files = files_of(self.config)
        name = self.context.name
        if self.config.document != "line":
            return grouped_units(name, files, unit_bytes)
        units: list[Unit] = []
        for path in files:
            in_ranges = file_kind(path).is_plain
            if in_ranges:
                with self._open(path) as stream:
                    in_ranges = not has_lone_returns(Peekable(stream).peek(HEAD_BYTES))
            units += range_units(name, path, unit_bytes) if in_ranges else [whole_unit(name, path)]
        return units

    def _open(self, path: str) -> AbstractContextManager[Stream]:
        # Only UTF-8 can give way to what a byte order mark says; other encodings are decoded
        # document by document.
        return open_stream(path, "utf-8" if self._encoding == "utf-8" else None)

    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        self.lines_read = 0
        for path in unit.files:
            with self._open(path) as stream:
                try:
                    match self.config.document:
                        case "file":
                            yield self._whole(path, stream)
                        case "line":
                            yield from self._by_line(path, stream, unit)
                        case "separator":
                            yield from self._by_separator(path, stream)
                except DamagedStream as error:
                    whole = damaged(path, self.lines_read, error)
                    yield (
                        whole._replace(size=stamp_of(path)[0])
                        if self.config.document == "file"
                        else whole
                    )

    def _whole(self, path: str, stream: Stream) -> Document | LeftOut:
        longest = self.context.max_record_bytes
        blocks: list[bytes] = []
        size = 0
        while size <= longest and (block := stream.read(min(BLOCK_BYTES, longest + 1 - size))):
            blocks.append(block)
            size += len(block)
        result = self._part(
            b"".join(blocks) if size <= longest else None, path, None, None, size, stream
        )
        if isinstance(result, LeftOut):
            return result._replace(size=stamp_of(path)[0])
        return result._replace(id=path)

    def _by_line(self, path: str, stream: Stream, unit: Unit) -> Iterator[Document | LeftOut]:
        if unit.end is None:
            stream = with_line_feeds(Peekable(stream))
        for line in read_lines(stream, unit.start, unit.end, self.context.max_record_bytes):
            self.lines_read = line.number
            content = None if line.content is None else line.content.removesuffix(b"\r")
            if content is None or content.strip():
                yield self._part(content, path, line.number, line.offset, line.size, stream)

    def _by_separator(self, path: str, stream: Stream) -> Iterator[Document | LeftOut]:
        assert self.config.separator is not None
        separator = self.config.separator.encode(self.config.encoding)
        longest = self.context.max_record_bytes
        part: list[bytes] = []
        size = 0
        first = (1, 0)
        stream = with_line_feeds(Peekable(stream))
        for line in read_lines(stream, 0, None, longest):
            self.lines_read = line.number
            if line.content is not None and line.content.removesuffix(b"\r") == separator:
                if size:
                    yield self._part(
                        None if size > longest else b"".join(part), path, *first, size, stream
                    )
                part = []
                size = 0
                first = (line.number + 1, line.offset + len(line.content) + 1)
                continue
            size += line.size + 1
            if size > longest:
                part.clear()
            else:
                part += [line.content or b"", b"\n"]
        if size:
            yield self._part(None if size > longest else b"".join(part), path, *first, size, stream)

    def _part(
        self,
        content: bytes | None,
        path: str,
        line: int | None,
        offset: int | None,
        size: int,
        stream: Stream,
    ) -> Document | LeftOut:
        """The document that begins on this line, or the whole file.

        ``content`` is None if it is too long, ``size`` its bytes.
        """
        if content is None:
            return LeftOut(
                path,
                "too_long",
                line,
                offset,
                f"longer than {self.context.max_record_bytes} bytes",
                size=stored_bytes(stream, size),
            )
        is_utf8 = self._encoding == "utf-8"
        try:
            # An encoding with a byte order mark of its own takes it away itself.
            text = content.removeprefix(
                BYTE_ORDER_MARK if offset is None and is_utf8 else b""
            ).decode(self._encoding)
        except UnicodeError as error:
            position = f"byte {error.start}" if isinstance(error, UnicodeDecodeError) else "its end"
            detail = (
                f"not {self.config.encoding} at {position}; another encoding is named with"
                " --encoding"
            )
            return LeftOut(
                path,
                "invalid_utf8" if is_utf8 else "undecodable",
                line,
                offset,
                detail,
                size=stored_bytes(stream, size),
            )
        fault = text_fault(text, "text")
        if fault:
            return LeftOut(path, fault[0], line, offset, fault[1], size=stored_bytes(stream, size))
        return Document(text, f"{path}:{offset}", file=path)
