"""Files as sources see them: patterns, plain and compressed streams, lines of bounded length."""

from __future__ import annotations

import glob
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, cast

from data_pipeline.sources.containers import COMPRESSED as COMPRESSED
from data_pipeline.sources.containers import (
    DamagedStream,
    Described,
    Stream,
    describe,
    open_content,
)
from data_pipeline.sources.interface import BYTE_ORDER_MARK, LeftOut, Unit
from pretrain.core.errors import DataError

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 19


class Line(NamedTuple):
    """A line without its end, and its length in bytes.

    ``content`` is None if it is longer than the limit.
    """

    number: int
    offset: int
    content: bytes | None
    size: int


def list_files(patterns: list[str]) -> list[str]:
    """The files that patterns name: pattern by pattern, sorted inside each, none twice.

    Raises:
        DataError: for a pattern that matches no file.
    """
    return distinct(check_names([path for pattern in patterns for path in _matches(pattern)]))


def distinct(paths: list[str]) -> list[str]:
    """Return the paths without further names of the same file.

    A link, another spelling or another pattern may name a file again; that is reported.

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
        files = (
            f"{len(again)} more names of files that are named already"
            if len(again) > 1
            else "a file that is named already"
        )
        _warn_once(
            f"the input has {files} ({name} is {'named twice' if name == earlier else earlier}):"
            " each file is read once"
        )
    return list(first.values())


def identity_of(path: str) -> tuple[int, int]:
    """Return what all names of a file have in common: its device and inode number.

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
            raise DataError(
                f"the file name {os.fsencode(path)!r} is not UTF-8: rename the file or leave it out"
            )
    return paths


def _matches(pattern: str) -> list[str]:
    literal = os.path.expanduser(pattern)
    if os.path.isfile(literal):
        return [Path(literal).as_posix()]
    if os.path.isdir(literal):
        raise DataError(
            f"--input {pattern} is a folder: say which files of it, such as"
            f" '{pattern.rstrip('/')}/**/*.txt'"
        )
    matches = glob.glob(literal, recursive=True)
    found = sorted(Path(path).as_posix() for path in matches if os.path.isfile(path))
    for path in matches:
        if os.path.islink(path) and not os.path.exists(path):
            raise DataError(
                f"{path} is a link to a file that is not there: fetch it again, or remove the link"
            )
    if not found:
        raise DataError(
            f"--input {pattern} matches no file in {Path.cwd()}: check the path or the pattern"
        )
    return found


def unreadable(path: str, error: OSError) -> DataError:
    """Return the error for a file that cannot be read."""
    problem = error.strerror or error
    return DataError(
        f"{path} cannot be read ({problem}): make it readable or leave it out, then run the same"
        " command, which continues from where it stopped"
    )


def stamp_of(path: str) -> tuple[int, str]:
    """A file's size in bytes, and a text that changes with its size or time of change."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None
    return status.st_size, f"{status.st_size}:{status.st_mtime_ns}"


def file_kind(path: str) -> Described:
    """Return what a file is, by its first bytes.

    Raises:
        DataError: if it cannot be read, or is an archive or of a kind that has a source of its own.
    """
    try:
        with open(path, "rb") as raw:
            return describe(raw, path)
    except OSError as error:
        raise unreadable(path, error) from None


def whole_unit(source: str, path: str) -> Unit:
    """A file that one worker reads from end to end."""
    size, stamp = stamp_of(path)
    return Unit(source, (path,), size=size, stamp=stamp)


def range_units(source: str, path: str, unit_bytes: int) -> list[Unit]:
    """Byte ranges of a plain file."""
    size, stamp = stamp_of(path)
    ends = [min(start + unit_bytes, size) for start in range(0, size, unit_bytes)]
    return [
        Unit(source, (path,), start, end, end - start, stamp)
        for start, end in zip([0, *ends], ends)
    ]


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
            group = []
            stamps = []
            total = 0
        group.append(path)
        stamps.append(stamp)
        total += size
    if group:
        units.append(Unit(source, tuple(group), size=total, stamp=";".join(stamps)))
    return units


@contextmanager
def open_stream(path: str, encoding: str | None = "utf-8") -> Iterator[Stream]:
    """A file's content, decompressed and in UTF-8. Errors of reading become one sentence.

    Args:
        encoding: of the text; a byte order mark counts more if that is UTF-8. None: bytes as they
            are.

    Raises:
        DataError: if the file is gone, forbidden, on a failing disk, or of a kind that holds no
            lines.
    """
    try:
        with open(path, "rb") as raw:
            yield open_content(raw, path, encoding)
    except OSError as error:
        raise unreadable(path, error) from None


def read_lines(stream: Stream, start: int, end: int | None, max_bytes: int) -> Iterator[Line]:
    """Yield the lines that begin in [start, end) of a stream.

    A byte order mark at the start of the stream is not part of the first line.

    A line belongs to the range that its first byte is in, so ranges that follow each other give
    each line once.
    """
    # A range may begin inside a line, which belongs to the range before; the byte before it shows
    # that.
    offset = max(start - 1, 0)
    skipping = start > 0
    number = 0
    if start:
        cast(io.BufferedReader, stream).seek(offset)
    carried: list[bytes] = []
    size = 0
    long_from: int | None = (
        None  # where a line began that is too long, and is passed over to its end
    )
    for block in iter(lambda: stream.read(BLOCK_BYTES), b""):
        if offset == 0 and not carried and block.startswith(BYTE_ORDER_MARK):
            offset = len(BYTE_ORDER_MARK)
            block = block[len(BYTE_ORDER_MARK) :]
            # The first line belongs to the range that holds the mark's first byte.
            end = end and max(end, offset + 1)
        if skipping:
            cut = block.find(b"\n") + 1
            offset += cut or len(block)
            block = block[cut:]
            skipping = not cut
            if long_from is not None and cut:
                yield Line(number, long_from, None, offset - 1 - long_from)
                long_from = None
        if not skipping:
            begin = 0
            # find() looks at many bytes at once, split() at one.
            while (cut := block.find(b"\n", begin)) >= 0:
                if end is not None and offset >= end:
                    return
                content = block[begin:cut]
                if carried:
                    content = b"".join([*carried, content])
                    carried = []
                    size = 0
                number += 1
                length = len(content)
                yield Line(number, offset, content if length <= max_bytes else None, length)
                offset += length + 1
                begin = cut + 1
            carried.append(block[begin:])
            size += len(block) - begin
        if long_from is None and end is not None and offset >= end:
            return
        if size > max_bytes:
            number += 1
            long_from = offset
            offset = offset + size
            carried = []
            size = 0
            skipping = True
    content = b"".join(carried)
    if long_from is not None:
        yield Line(number, long_from, None, offset - long_from)
    elif content and (end is None or offset < end):
        yield Line(number + 1, offset, content, len(content))


def damaged(path: str, number: int, error: DamagedStream) -> LeftOut:
    """The rest of a compressed file that is cut short or damaged."""
    return LeftOut(
        path,
        "damaged_compression",
        number or None,
        None,
        one_line(str(error)) or "it ends too early",
        size=error.unread,
    )


def one_line(text: str) -> str:
    """Any text, made fit for the middle of a sentence."""
    return " ".join(text.split())[:300].rstrip(".").encode("utf-8", "replace").decode("utf-8")
