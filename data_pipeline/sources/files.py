"""Files as sources see them: patterns, plain and compressed streams, lines of bounded length."""

from __future__ import annotations

import glob
import gzip
import io
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_pipeline.sources.interface import LeftOut, Unit
from pretrain.config.errors import DataError

logger = logging.getLogger(__name__)

PLAIN_BLOCK_BYTES = 1 << 19
# Small, since what a damaged compressed file holds is lost from the block before the damage on.
BLOCK_BYTES = 1 << 18
COMPRESSED = (".gz", ".zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class DamagedZstd(Exception):
    """A .zst stream that is cut short or damaged."""


# What the decompressors raise for such a stream.
DAMAGED_STREAM = (EOFError, zlib.error, gzip.BadGzipFile, DamagedZstd)


class Line(NamedTuple):
    """A line without its end. ``content`` is None where it is longer than the limit."""

    number: int
    offset: int
    content: bytes | None


def list_files(patterns: list[str]) -> list[str]:
    """The files that patterns name: pattern by pattern, sorted inside each, none twice.

    Raises:
        DataError: for a pattern that matches no file.
    """
    return distinct(check_names([path for pattern in patterns for path in _matches(pattern)]))


def distinct(paths: list[str]) -> list[str]:
    """The paths without those of a file that an earlier one names, by another spelling, a link or another pattern; that is said.

    Raises:
        DataError: for a file that is gone or forbidden.
    """
    first: dict[tuple[int, int], str] = {}
    again: list[tuple[str, str]] = []
    for path in paths:
        identity = identity_of(path)
        if identity in first:
            again.append((path, first[identity]))
        else:
            first[identity] = path
    if again:
        name, earlier = again[0]
        files = f"{len(again)} more names of files that are named already" if len(again) > 1 else "a file that is named already"
        _warn_once(f"the input has {files} ({name} is {'named twice' if name == earlier else earlier}): each file is read once")
    return list(first.values())


def identity_of(path: str) -> tuple[int, int]:
    """What all names of a file have in common: its device and its number there.

    Raises:
        DataError: for a file that is gone or forbidden.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None
    return status.st_dev, status.st_ino


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    """The input is listed more often than once in a build."""
    logger.warning("%s", message)


def check_names(paths: list[str]) -> list[str]:
    """The paths themselves.

    Raises:
        DataError: for a name that is not UTF-8, since no manifest could hold it.
    """
    for path in paths:
        if not path.isascii() and path != path.encode("utf-8", "replace").decode("utf-8"):
            raise DataError(f"the file name {os.fsencode(path)!r} is not UTF-8: rename the file or leave it out")
    return paths


def _matches(pattern: str) -> list[str]:
    literal = os.path.expanduser(pattern)
    if os.path.isfile(literal):
        return [Path(literal).as_posix()]
    if os.path.isdir(literal):
        raise DataError(f"--input {pattern} is a folder: say which files of it, such as '{pattern.rstrip('/')}/**/*.txt'")
    found = sorted(Path(path).as_posix() for path in glob.glob(literal, recursive=True) if os.path.isfile(path))
    if not found:
        raise DataError(f"--input {pattern} matches no file in {Path.cwd()}: check the path or the pattern")
    return found


def is_compressed(path: str) -> bool:
    return path.endswith(COMPRESSED)


def unreadable(path: str, error: OSError) -> DataError:
    problem = error.strerror or error
    return DataError(
        f"{path} cannot be read ({problem}): make it readable or leave it out, then run the same command, which goes on where it stopped"
    )


def stamp_of(path: str) -> tuple[int, str]:
    """A file's size in bytes, and a text that changes with its size or time of change."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None
    return status.st_size, f"{status.st_size}:{status.st_mtime_ns}"


def range_units(source: str, files: list[str], unit_bytes: int) -> list[Unit]:
    """Byte ranges of plain files, and whole compressed ones."""
    units = []
    for path in files:
        size, stamp = stamp_of(path)
        if is_compressed(path):
            units.append(Unit(source, (path,), size=size, stamp=stamp))
            continue
        for start in range(0, size, unit_bytes):
            units.append(Unit(source, (path,), start, min(start + unit_bytes, size), min(unit_bytes, size - start), stamp))
    return units


def grouped_units(source: str, files: list[str], unit_bytes: int) -> list[Unit]:
    """Whole files, small ones in groups of about ``unit_bytes``."""
    units: list[Unit] = []
    group: list[str] = []
    stamps: list[str] = []
    total = 0
    for path in files:
        size, stamp = stamp_of(path)
        if group and total + size > unit_bytes:
            units.append(Unit(source, tuple(group), size=total, stamp=";".join(stamps)))
            group, stamps, total = [], [], 0
        group.append(path)
        stamps.append(stamp)
        total += size
    if group:
        units.append(Unit(source, tuple(group), size=total, stamp=";".join(stamps)))
    return units


class _ZstdStream:
    """Arrow's reader takes several frames in a row, and knows one that is cut short, which the package zstandard takes for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        import pyarrow

        self._stream: Any = pyarrow.CompressedInputStream(raw, "zstd")

    def read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except OSError as error:
            if error.errno is not None:  # the disk's fault, not the stream's
                raise
            raise DamagedZstd(str(error)) from None

    def __enter__(self) -> _ZstdStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


@contextmanager
def open_stream(path: str) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed by its name's ending. Errors of reading become one sentence.

    Raises:
        DataError: where the file is gone, forbidden, or on a failing disk.
    """
    try:
        with open(path, "rb") as raw:
            if path.endswith(".gz"):
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield stream  # type: ignore[misc]
            elif path.endswith(".zst"):
                with _ZstdStream(raw) as stream:
                    yield stream  # type: ignore[misc]
            else:
                yield raw
    except gzip.BadGzipFile:
        raise
    except OSError as error:
        raise unreadable(path, error) from None


def read_lines(stream: BinaryIO, start: int, end: int | None, max_bytes: int) -> Iterator[Line]:
    """The lines that begin in [start, end) of a stream; a byte order mark at its very start is no part of the first one.

    A line belongs to the range that its first byte lies in, so ranges that follow each other give each line once.
    """
    # A range may begin inside a line, which belongs to the range before; the byte before it tells.
    offset, skipping, number = max(start - 1, 0), start > 0, 0
    if start:
        stream.seek(offset)
    carried: list[bytes] = []
    size = 0
    block_bytes = PLAIN_BLOCK_BYTES if isinstance(stream, io.BufferedReader) else BLOCK_BYTES
    for block in iter(lambda: stream.read(block_bytes), b""):
        if offset == 0 and not carried and block.startswith(BYTE_ORDER_MARK):
            offset, block = len(BYTE_ORDER_MARK), block[len(BYTE_ORDER_MARK) :]
            end = end and max(end, offset + 1)  # the first line belongs to the range that holds the mark's first byte
        if skipping:
            cut = block.find(b"\n") + 1
            offset += cut or len(block)
            block, skipping = block[cut:], not cut
        if not skipping:
            begin = 0
            # find() looks at many bytes at once, split() at one.
            while (cut := block.find(b"\n", begin)) >= 0:
                if end is not None and offset >= end:
                    return
                content = block[begin:cut]
                if carried:
                    content = b"".join([*carried, content])
                    carried, size = [], 0
                number += 1
                yield Line(number, offset, content if len(content) <= max_bytes else None)
                offset += len(content) + 1
                begin = cut + 1
            carried.append(block[begin:])
            size += len(block) - begin
        if end is not None and offset >= end:
            return
        if size > max_bytes:
            number += 1
            yield Line(number, offset, None)
            offset, carried, size, skipping = offset + size, [], 0, True
    content = b"".join(carried)
    if content and (end is None or offset < end):
        yield Line(number + 1, offset, content)


def damaged(path: str, number: int, error: Exception) -> LeftOut:
    """The rest of a compressed file that is cut short or damaged."""
    return LeftOut(path, "damaged_compression", number or None, None, one_line(str(error)) or "it ends too early")


def one_line(text: str) -> str:
    """Any text, made fit for the middle of a sentence."""
    return " ".join(text.split())[:300].rstrip(".").encode("utf-8", "replace").decode("utf-8")
