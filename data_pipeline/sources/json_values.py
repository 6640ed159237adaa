"""JSON that is not one value a line: arrays, values over many lines, several on a line.

Read as a stream, one value held at a time.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import NamedTuple

import orjson

from data_pipeline.sources.containers import Stream
from data_pipeline.sources.interface import BYTE_ORDER_MARK

BLOCK_BYTES = 1 << 18
# A value with an error may be read to the file's end before it shows, and those after it again.
# This much more than the file itself, at most.
READ_AGAIN_BYTES = 64 << 20
LINE_BYTES = 1 << 16

SPACE_AND_COMMAS = re.compile(rb"[ \t\r\n,]*+")
SPACE = b" \t\r\n"
# Strings end on their line: a line end inside one has to be written as \n.
IN_STRING = re.compile(rb'(?:[^"\\\n]++|\\[^\n])*+')
UP_TO_BRACKET = re.compile(rb'(?:[^"{}\[\]]++|"(?:[^"\\\n]++|\\[^\n])*+")*+')
SCALAR = re.compile(rb"[-+.\w]++")
CLOSES = {ord("}"): ord("{"), ord("]"): ord("[")}


class Value(NamedTuple):
    """A value of a file: at the top, or in an array at the top.

    Attributes:
        number: the line that it begins on, from 1.
        offset: of its first byte.
        content: its bytes; None if it is too long or has no end.
        size: its bytes, and those that had to be passed over to find the next value.
        fault: why it has no end; empty if it has one.
    """

    number: int
    offset: int
    content: bytes | None
    size: int
    fault: str = ""


class _Broken(Exception):
    """A place that no JSON value goes through."""


def holds_lines(head: bytes, is_whole: bool) -> bool:
    """Whether a file holds one value a line, by its first bytes.

    Args:
        head: the first bytes of the file, or all of them.
        is_whole: they are all.
    """
    head = head.removeprefix(BYTE_ORDER_MARK).lstrip(SPACE)
    if head[:1] != b"{":
        return head[:1] != b"["
    line, end, _ = head.partition(b"\n")
    values = list(ValueReader(io.BytesIO(line), len(line)))
    if end or is_whole:
        if all(value.content is not None for value in values):
            return True
        # A first line that no line after it completes is a bad line, not the beginning of a long
        # value.
        first = next(iter(ValueReader(io.BytesIO(head), len(head))))
        return first.content is None and not (first.fault == ENDS_INSIDE and not is_whole)
    # Of a long line the end is not known; but a value that ends before it, and another behind, are
    # a file on one line.
    return len(values) < 2


ENDS_INSIDE = "the file ends inside it"


class ValueReader:
    """The values of a stream.

    After one that has no end, reading resumes at the next place that looks like the beginning of
    another.

    Args:
        stream: JSON in UTF-8.
        longest: longer values are passed over, and never held.
    """

    def __init__(self, stream: Stream, longest: int) -> None:
        self._stream, self._longest = stream, longest
        self._data = bytearray()
        self._at = 0  # of the next value, in the data that is held
        self._offset = 0  # of the data, in the file
        self.line = 1
        self._read_again = 0
        self._is_at_end = False

    def __iter__(self) -> Iterator[Value]:
        if self._fill(len(BYTE_ORDER_MARK)) and self._data.startswith(BYTE_ORDER_MARK):
            self._at = len(BYTE_ORDER_MARK)
        in_array = False
        while True:
            indent = self._skip_space()
            if self._at == len(self._data):
                if in_array:
                    yield Value(
                        self.line,
                        self._offset + self._at,
                        None,
                        0,
                        "the file ends before its array does",
                    )
                return
            first = self._data[self._at]
            if first == ord("[") and not in_array:
                in_array = True
                self._advance(self._at + 1)
            elif first == ord("]") and in_array:
                in_array = False
                self._advance(self._at + 1)
            else:
                value = self._value(first, indent)
                in_array = in_array and not (
                    value.fault and self._at == len(self._data) and self._is_at_end
                )
                yield value

    def _value(self, first: int, indent: bytes | None) -> Value:
        """The value that begins here; afterwards the next one begins here."""
        line = self.line
        start = self._offset + self._at
        try:
            end = self._end(first)
        except _Broken as broken:
            self._find_next(start, indent)
            return Value(line, start, None, self._offset + self._at - start, str(broken))
        size = self._offset + end - start
        content = bytes(self._data[self._at : end]) if size <= self._longest else None
        self._advance(end)
        return Value(line, start, content, size)

    def _end(self, first: int) -> int:
        """Return where the value that begins here ends, in the data that is held."""
        if first in b"{[":
            return self._end_on_its_line() or self._bracket_end()
        if first == ord('"'):
            return self._string_end(self._at + 1)
        pattern = SCALAR if SCALAR.match(self._data, self._at) else re.compile(rb"[^\n]*+")
        at = self._at
        while True:
            found = pattern.match(self._data, at)
            at = found.end() if found else at
            if at < len(self._data):
                return at
            at = self._more(at)
            if at == len(self._data):
                return at

    def _end_on_its_line(self) -> int | None:
        """Return the end of a value that has its line to itself.

        Parsing such a line is faster than looking for its brackets.
        """
        end = self._data.find(b"\n", self._at, self._at + LINE_BYTES)
        content = self._data[self._at : max(end, self._at)].rstrip(SPACE + b",")
        try:
            orjson.loads(content)
        except orjson.JSONDecodeError:
            return None
        return self._at + len(content)

    def _bracket_end(self) -> int:
        at = self._at
        open_brackets = bytearray()
        while True:
            found = UP_TO_BRACKET.match(self._data, at)
            assert found is not None  # it matches nothing at all too
            at = found.end()
            if at == len(self._data):
                at = self._more(at)
                if at == len(self._data):
                    raise _Broken(ENDS_INSIDE)
                continue
            byte = self._data[at]
            if byte == ord('"'):
                at = self._string_end(at + 1)
            elif byte in b"{[":
                if open_brackets:
                    self._check_before(at, open_brackets[-1])
                open_brackets.append(byte)
                at += 1
            else:
                if open_brackets.pop() != CLOSES[byte]:
                    raise _Broken(f"a {chr(byte)} that closes nothing")
                at += 1
                if not open_brackets:
                    return at

    def _check_before(self, at: int, inside: int) -> None:
        """Raise if a bracket cannot begin a value here, which shows early that one is not closed.

        A value is behind a colon in an object, and behind a comma or first in an array.
        """
        before = at - 1
        while before >= 0 and self._data[before] in SPACE:
            before -= 1
        if before >= 0 and self._data[before] not in (b":" if inside == ord("{") else b"[,"):
            raise _Broken("a value begins inside it that does not belong to it")

    def _string_end(self, at: int) -> int:
        while True:
            found = IN_STRING.match(self._data, at)
            assert found is not None
            at = found.end()
            is_cut = at == len(self._data) or (
                self._data[at] == ord("\\") and at + 1 == len(self._data)
            )
            if not is_cut:
                if self._data[at] != ord('"'):
                    raise _Broken("a line ends inside a text")
                return at + 1
            held = len(self._data) - at
            at = self._more(at)
            if len(self._data) - at == held:
                raise _Broken(ENDS_INSIDE)

    def _more(self, at: int) -> int:
        """Reads on; ``at`` moves with the data, as that of a value that is too long is not kept."""
        if len(self._data) - self._at > self._longest:
            at -= self._drop(at)
        self._fill(len(self._data) + 1)
        return at

    def _fill(self, size: int) -> bool:
        """Whether there are as many bytes, once more are read if that takes it."""
        while len(self._data) < size and not self._is_at_end:
            block = self._stream.read(BLOCK_BYTES)
            self._data += block
            self._is_at_end = not block
        return len(self._data) >= size

    def _drop(self, up_to: int) -> int:
        self.line += self._data.count(b"\n", self._at, up_to)
        del self._data[:up_to]
        self._offset += up_to
        self._at = 0
        return up_to

    def _advance(self, to: int) -> None:
        self.line += self._data.count(b"\n", self._at, to)
        self._at = to
        if to >= BLOCK_BYTES:
            del self._data[:to]
            self._offset += to
            self._at = 0

    def _skip_space(self) -> bytes | None:
        """Goes to the next value.

        What is before it on its line, if that is nothing but space.
        """
        gap = b"\n" if self._offset + self._at in (0, len(BYTE_ORDER_MARK)) else b""
        while True:
            found = SPACE_AND_COMMAS.match(self._data, self._at)
            assert found is not None
            gap = (gap + found.group())[-1024:]
            self._advance(found.end())
            if self._at < len(self._data) or not self._fill(self._at + 1):
                _, end, indent = gap.rpartition(b"\n")
                return indent if end and b"," not in indent else None

    def _find_next(self, start: int, indent: bytes | None) -> None:
        """Skip a broken value, to the next place that looks like the beginning of another.

        That is on a line with the same indentation, or behind a comma between braces; if neither
        comes, it is the end.
        """
        border = re.compile(
            rb"\}[ \t\r\n]*+,[ \t\r\n]*+(?=\{)"
            if indent is None
            else rb"\n" + re.escape(indent) + rb"(?=\{)"
        )
        again = self._offset + len(self._data) - start
        self._read_again += again
        at = (
            self._at + 1
            if self._read_again <= self._offset + self._at + READ_AGAIN_BYTES
            else len(self._data)
        )
        while True:
            found = border.search(self._data, at)
            if found:
                self._advance(found.end())
                return
            # The border may begin in what is held and end in what comes.
            kept = max(len(self._data) - 1024, self._at)
            at = max(at - self._drop(kept), 0)
            if not self._fill(len(self._data) + 1):
                self._advance(len(self._data))
                return
