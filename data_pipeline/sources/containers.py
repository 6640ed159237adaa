"""Finds out what a file is by its first bytes, not by its name.

It may be plain, compressed, in UTF-16 or UTF-32, or nothing that holds lines.
"""

from __future__ import annotations

import bz2
import codecs
import lzma
import re
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from pretrain.core.errors import ConfigError, DataError

MARK_BYTES = 512  # that of a tar archive is at byte 257
HEAD_BYTES = 1 << 16  # by which the kind of a text is known
INPUT_BYTES = 1 << 16
SKIP_BYTES = 1 << 18
# Up to here a damaged stream is read byte by byte at its end. More than this of one block of input
# is no text.
SLOW_BYTES = 8 << 20
XZ_MEMORY_BYTES = 1 << 30
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4")

# First bytes, and the name's ending that says the same; of an lz4 or a zstd stream either may begin
# with a frame to skip.
MAGIC = {
    ".gz": b"\x1f\x8b",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".xz": b"\xfd7zXZ\0",
    ".lz4": b"\x04\x22\x4d\x18",
}
BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)")
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")

UNPACK = "unpack it and give the files in it"
OTHER_KINDS = (
    (b"PK\x03\x04", "a zip archive", UNPACK),
    (b"PK\x05\x06", "an empty zip archive", "leave it out"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (b"\x1f\x9d", "a file of the old program compress", "uncompress it"),
    (b"ARROW1\0\0", "an Arrow file", "read it with --format arrow (kind: arrow)"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "read it with --format arrow (kind: arrow)"),
    (b"Obj\x01", "an Avro file", "write it as Parquet or JSON lines"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "write its texts as Parquet or JSON lines"),
    (b"SQLite format 3\0", "an SQLite database", "write its texts as CSV or JSON lines"),
    (b"\x93NUMPY", "a NumPy array", "write its texts as JSON lines"),
)

# The longer marks first: that of UTF-32 begins like that of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Names that leave the byte order to a mark, and the order of a file without one: that of Windows,
# and of Python on most machines.
WITHOUT_MARK = {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}
# What no encoding holds becomes half of a pair, which UTF-8 cannot hold either: the record that has
# it is left out, and no other.
UNDECODABLE = "data_pipeline.undecodable"
codecs.register_error(UNDECODABLE, lambda error: ("\udcff", cast(UnicodeDecodeError, error).end))


class DamagedStream(Exception):
    """A compressed stream that is cut short or damaged.

    Attributes:
        unread: bytes of the file behind the damage.
    """

    def __init__(self, problem: str, unread: int) -> None:
        super().__init__(problem)
        self.unread = unread


class Stream(Protocol):
    """Bytes one after the other; fewer than asked for do not mean the end."""

    def read(self, size: int, /) -> bytes:
        """Return at most ``size`` bytes; none at the end."""


def checked_encoding(name: str) -> str:
    """Python's own name of an encoding.

    Raises:
        ConfigError: for one that it does not know.
    """
    try:
        b"a".decode(name, "replace")  # refuses those that are no encodings of text, such as base64
        codecs.getincrementaldecoder(name)(UNDECODABLE)
        return codecs.lookup(name).name
    except (LookupError, UnicodeError):
        # UnicodeError is for encodings of internet names, such as idna.
        raise ConfigError(
            f"encoding: Python knows no encoding '{name}': use utf-8, latin-1, cp1252, utf-16 ..."
        ) from None


def compression_of(head: bytes, path: str) -> str | None:
    """The usual ending of a compressed stream's name; None for one that is not compressed.

    The name counts only if there are too few bytes to decide.
    """
    for ending, magic in MAGIC.items():
        if head.startswith(magic) or (path.endswith(ending) and magic.startswith(head)):
            return ending
    if BZIP2.match(head) or (
        path.endswith(".bz2") and len(head) < 10 and b"BZh9".startswith(head[:3])
    ):
        return ".bz2"
    if SKIPPABLE.match(head):
        return ".lz4" if path.endswith(".lz4") else ".zst"
    return None


def encoding_of(head: bytes) -> str | None:
    """UTF-16 or UTF-32, if a byte order mark says so."""
    return next((encoding for mark, encoding in BYTE_ORDER_MARKS if head.startswith(mark)), None)


def refuse_other_kinds(head: bytes, path: str) -> None:
    """Refuse files without lines of text.

    Raises:
        DataError: for an archive, or another format that holds no lines of text.
    """
    kind = next(
        ((kind, advice) for magic, kind, advice in OTHER_KINDS if head.startswith(magic)), None
    )
    if head[257:262] == b"ustar":
        kind = ("a tar archive", UNPACK)
    elif head.startswith(b"PAR1") and b"\0" in head:
        kind = ("a Parquet file", "read it with --format parquet (kind: parquet)")
    if kind is not None:
        raise DataError(f"{path} is {kind[0]}, whatever its name says: {kind[1]}")


class Described(NamedTuple):
    """A file's compression and encoding, by its first bytes.

    None is no compression, and UTF-8 or no byte order mark.
    """

    compression: str | None
    encoding: str | None

    @property
    def is_plain(self) -> bool:
        """Whether the bytes are neither compressed nor in another encoding."""
        return self.compression is None and self.encoding is None


def describe(raw: BinaryIO, path: str) -> Described:
    """Return what an open file is; it is at its start again afterwards.

    Raises:
        DataError: for a file that is of another kind.
    """
    head = raw.read(MARK_BYTES)
    raw.seek(0)
    compression = compression_of(head, path)
    if compression is None:
        refuse_other_kinds(head, path)
    return Described(compression, encoding_of(head) if compression is None else None)


def open_content(raw: BinaryIO, path: str, encoding: str | None) -> Stream:
    """Return a file's decompressed content in UTF-8; a plain file is returned as it is.

    Args:
        encoding: of the text; a byte order mark counts more if that is UTF-8. None: bytes are given
            as they are.

    Raises:
        DataError: for a file that is of another kind.
    """
    compression, marked = describe(raw, path)
    content: Stream = raw
    if compression is not None:
        content = Peekable(Decompressed(raw, compression))
        head = content.peek(MARK_BYTES)
        if compression_of(head, ""):
            raise DataError(f"{path} is compressed twice: decompress it once")
        refuse_other_kinds(head, path)
        marked = encoding_of(head)
    if encoding is None:
        return content
    name = codecs.lookup(encoding).name
    if name in WITHOUT_MARK:
        return Utf8(content, marked or WITHOUT_MARK[name])
    if name != "utf-8":
        return Utf8(content, name)
    return Utf8(content, marked) if marked else content


def stored_bytes(stream: Stream, size: int) -> int:
    """About how many bytes of the file ``size`` bytes of its content take."""
    return int(size * getattr(stream, "ratio", 1.0))


class Peekable:
    """A stream whose next bytes can be looked at."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._ahead = stream, b""
        self._damage: DamagedStream | None = None

    def peek(self, size: int) -> bytes:
        """Return the next ``size`` bytes without consuming them, fewer at the end.

        Damage behind them is reported by :meth:`read`.
        """
        try:
            while len(self._ahead) < size and (block := self._stream.read(size)):
                self._ahead += block
        except DamagedStream as error:
            self._damage = error
        return self._ahead[:size]

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, then raise the damage that :meth:`peek` met."""
        block = self._ahead[:size]
        self._ahead = self._ahead[size:]
        if not block and self._damage is not None:
            raise self._damage
        return block or self._stream.read(size)

    @property
    def ratio(self) -> float:
        """Compressed bytes for each byte that was read; 1 if the stream is not compressed."""
        return getattr(self._stream, "ratio", 1.0)


def has_lone_returns(head: bytes) -> bool:
    """Whether lines end with a carriage return alone, by the first bytes of a text."""
    return b"\r" in head and b"\n" not in head


def with_line_feeds(stream: Peekable) -> Stream:
    """The stream itself, or with line feeds for lone carriage returns."""
    return _LineFeeds(stream) if has_lone_returns(stream.peek(HEAD_BYTES)) else stream


class _LineFeeds:
    def __init__(self, stream: Peekable) -> None:
        self._stream = stream

    def read(self, size: int, /) -> bytes:
        return self._stream.read(size).replace(b"\r", b"\n")

    @property
    def ratio(self) -> float:
        return self._stream.ratio


class Utf8:
    """Text of another encoding, as UTF-8."""

    def __init__(self, stream: Stream, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(errors=UNDECODABLE)
        self._read = self._given = 0

    def read(self, size: int, /) -> bytes:
        """Return about ``size`` bytes of UTF-8; none at the end."""
        while True:
            block = self._stream.read(size)
            content = self._decoder.decode(block, final=not block).encode("utf-8", "surrogatepass")
            self._read += len(block)
            self._given += len(content)
            if content or not block:
                return content

    @property
    def ratio(self) -> float:
        """Bytes of the file for each byte of UTF-8 so far."""
        return getattr(self._stream, "ratio", 1.0) * self._read / max(self._given, 1)


class Decompressed:
    """The content of a compressed file, up to damage if there is any.

    All that can be had before the damage comes first, byte for byte, and then the error.
    """

    def __init__(self, raw: BinaryIO, kind: str) -> None:
        self._raw, self._kind = raw, kind
        self._decoder = _decoder(kind, _Input(raw))
        self._position = 0
        self._damage: DamagedStream | None = None

    def read(self, size: int, /) -> bytes:
        """Return the next bytes.

        Raises:
            DamagedStream: once everything before the damage has been returned.
        """
        if self._damage is not None:
            raise self._damage
        try:
            block = self._decoder.read(min(size, SKIP_BYTES))
        except (zlib.error, lzma.LZMAError, EOFError, ValueError, OSError) as error:
            _only_damage(error)
            block = self._slowly()
            if not block and self._damage is not None:
                raise self._damage from None
        if not block and not self._raw.tell():
            raise DamagedStream("it is empty", 0)
        self._position += len(block)
        return block

    def _slowly(self) -> bytes:
        """Read the file again, and its end in small steps.

        A library does not return what it had decompressed when it met the damage.
        """
        fast = max(self._raw.tell() - INPUT_BYTES, 0)
        size = self._raw.seek(0, 2)
        self._raw.seek(0)
        self._decoder = _decoder(self._kind, _Input(self._raw, fast))
        found = bytearray()
        try:
            skipped = 0
            while skipped < self._position:
                skipped += len(self._decoder.read(min(SKIP_BYTES, self._position - skipped)))
            while block := self._decoder.read(1 if len(found) < SLOW_BYTES else SKIP_BYTES):
                found += block
        except (zlib.error, lzma.LZMAError, EOFError, ValueError, OSError) as error:
            _only_damage(error)
            self._damage = DamagedStream(str(error), size - self._raw.tell())
        return bytes(found)

    @property
    def ratio(self) -> float:
        """Compressed bytes for each byte of content so far."""
        return self._raw.tell() / max(self._position, 1)


def _only_damage(error: Exception) -> None:
    """Raises what is the disk's fault and not the stream's."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


class _Input:
    """A compressed file's bytes, one at a time from ``fast`` on."""

    closed = False

    def __init__(self, raw: BinaryIO, fast: int | None = None) -> None:
        self._raw, self._fast = raw, fast

    def read(self, size: int = INPUT_BYTES, /) -> bytes:
        if self._fast is not None:
            left = self._fast - self._raw.tell()
            size = min(size, left) if left > 0 else 1
        return self._raw.read(size)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """The file is closed by the one who opened it."""


def _decoder(kind: str, source: _Input) -> Stream:
    if kind in (".zst", ".lz4"):
        # pyarrow reads several frames in a row, and recognises one that is cut short.
        import pyarrow

        return pyarrow.CompressedInputStream(source, {".zst": "zstd", ".lz4": "lz4"}[kind])
    makers: dict[str, Callable[[], Any]] = {
        ".gz": _Inflate,
        ".bz2": bz2.BZ2Decompressor,
        ".xz": lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES),
    }
    return _Members(source, makers[kind])


class _Inflate:
    """zlib's decompressor of a gzip member, with the methods of those of bz2 and lzma."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        block = self._stream.decompress(self._stream.unconsumed_tail + data, max_length)
        # With a full block there may be more to come without any input.
        self.needs_input = not self._stream.unconsumed_tail and len(block) < max_length
        return block

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data


class _Members:
    """Streams of one kind, one behind the other; zeros behind the last one are padding."""

    def __init__(self, source: _Input, make: Callable[[], Any]) -> None:
        self._source, self._make = source, make
        self._decoder, self._input = make(), b""

    def read(self, size: int, /) -> bytes:
        while True:
            if self._decoder is None:
                self._input = self._input.lstrip(b"\0")
                while not self._input:
                    block = self._source.read()
                    if not block:
                        return b""
                    self._input = block.lstrip(b"\0")
                self._decoder = self._make()
            given = self._input
            self._input = b""
            is_last = False
            if not given and self._decoder.needs_input:
                given = self._source.read()
                is_last = not given
            block = self._decoder.decompress(given, size)
            if self._decoder.eof:
                self._input, self._decoder = self._decoder.unused_data, None
            elif is_last and not block:
                raise EOFError("it ends too early")
            if block:
                return block
