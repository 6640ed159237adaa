"""Small input files of every kind, whole and damaged, with what a reader that is not ours finds in
each.

Another format joins with an entry in ``FORMATS``, another container with one in ``CONTAINERS``: the
tests run over all of them.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

SEPARATOR = "<|end|>"
WORDS = [
    "alpha",
    "beta,",
    "γάμμα",
    "δ😀",
    "it's",
    "[ep]",
    "{brace}",
    "back\\slash",
    "semi;colon",
    "中文",
    "mü",
    "12.5",
    "null",
    "#x",
    "a|b",
]


def make_texts(
    source: random.Random, count: int, with_lines: bool, with_quotes: bool = True
) -> list[str]:
    """Texts that differ from each other; some with line ends and quotes inside, if the format can
    hold them.
    """
    words = (
        WORDS
        + (['"quoted"', 'half"quote'] if with_quotes else [])
        + (["new\nline"] if with_lines else [])
    )
    return [
        f"d{number}x " + " ".join(source.choices(words, k=source.randint(1, 12)))
        for number in range(count)
    ]


def is_document(text: Any) -> bool:
    """What the pipeline promises of a document, checked in another way than its own."""
    if not isinstance(text, str) or not text.strip() or "\0" in text or "\ufffd" in text:
        return False
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


# --- formats: how texts become a file, and how an independent reader takes them out again ---------


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        section: of the recipe, without ``input``.
        write: a file's content from texts.
        read: the documents in a file's decompressed bytes, as an independent reader finds them;
            those before an error if there is one.
        is_text: it can be in any encoding; else ``write`` gives bytes, and ``read`` takes them.
        holds_lines: texts may hold line ends.
    """

    name: str
    ending: str
    section: dict[str, Any]
    write: Callable[[list[str], random.Random], str | bytes]
    read: Callable[[Any], list[str]]
    is_text: bool = True
    holds_lines: bool = True


def _record(text: str, source: random.Random) -> dict[str, Any]:
    return {
        "id": source.randrange(100),
        "meta": {"tags": ["x", {"y": 1}], "score": 0.5},
        "text": text,
    }


def _text_of(record: Any) -> Iterator[str]:
    if isinstance(record, dict) and is_document(record.get("text")):
        yield record["text"]


def _read_jsonl(content: str) -> list[str]:
    found = []
    for line in content.split("\n"):
        try:
            found += _text_of(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return found


def _read_values(content: str) -> list[str]:
    """Values and elements one after the other, with the standard library's decoder."""
    decoder, found, at = json.JSONDecoder(), [], 0
    at += len(content) - len(content.lstrip(" \t\r\n["))
    while at < len(content):
        try:
            record, at = decoder.raw_decode(content, at)
        except (ValueError, RecursionError):
            break
        found += _text_of(record)
        at += len(content[at:]) - len(content[at:].lstrip(" \t\r\n,[]"))
    return found


def _write_csv(
    texts: list[str], source: random.Random, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL
) -> str:
    stream = io.StringIO(newline="")
    rows = csv.writer(
        stream,
        delimiter=delimiter,
        lineterminator="\n",
        quoting=quoting,
        quotechar='"' if quoting != csv.QUOTE_NONE else None,
    )
    rows.writerows([["id", "text", "n"], *([number, text, 5] for number, text in enumerate(texts))])
    return stream.getvalue()


def _read_csv(content: str, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> list[str]:
    rows = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, quoting=quoting)
    found: list[str] = []
    header: list[str] | None = None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return found
        except csv.Error:
            continue
        if header is None:
            header = row or None
        elif len(row) == len(header) and row != header and "text" in header:
            found += filter(is_document, [row[header.index("text")]])


def _tsv(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_lines(content: str) -> list[str]:
    return [
        line
        for line in (line.removesuffix("\r") for line in content.split("\n"))
        if is_document(line)
    ]


def _read_separated(content: str) -> list[str]:
    found, part = [], ""
    lines = content.split("\n")
    for line in lines if lines[-1] else lines[:-1]:
        if line.removesuffix("\r") == SEPARATOR:
            found, part = [*found, part], ""
        else:
            part += line + "\n"
    return [text for text in [*found, part] if is_document(text)]


def _json_lines(texts: list[str], source: random.Random) -> str:
    return "".join(
        json.dumps(_record(text, source), ensure_ascii=source.random() < 0.5) + "\n"
        for text in texts
    )


def _array(indent: int | None) -> Callable[[list[str], random.Random], str]:
    return lambda texts, source: (
        json.dumps([_record(text, source) for text in texts], indent=indent, ensure_ascii=False)
        + "\n"
    )


FORMATS = [
    Format("jsonl", ".jsonl", {"kind": "jsonl"}, _json_lines, _read_jsonl),
    Format("array", ".json", {"kind": "jsonl"}, _array(None), _read_values),
    Format("pretty_array", ".json", {"kind": "jsonl"}, _array(2), _read_values),
    Format(
        "array_of_lines",
        ".json",
        {"kind": "jsonl"},
        lambda texts, source: (
            "[\n" + _json_lines(texts, source).rstrip("\n").replace("\n", ",\n") + "\n]\n"
        ),
        _read_values,
    ),
    Format(
        "pretty_objects",
        ".json",
        {"kind": "jsonl"},
        lambda texts, source: "".join(
            json.dumps(_record(text, source), indent=1) + "\n" for text in texts
        ),
        _read_values,
    ),
    Format("csv", ".csv", {"kind": "csv"}, _write_csv, _read_csv),
    Format(
        "tsv",
        ".tsv",
        {"kind": "csv", "delimiter": "\t"},
        _tsv(_write_csv),
        _tsv(_read_csv),
        holds_lines=False,
    ),
    Format(
        "file",
        ".txt",
        {"kind": "text"},
        lambda texts, source: "\n".join(texts) + "\n",
        lambda content: [content] if is_document(content) else [],
    ),
    Format(
        "line",
        ".txt",
        {"kind": "text", "document": "line"},
        lambda texts, source: "".join(f"{text}\n" for text in texts),
        _read_lines,
        holds_lines=False,
    ),
    Format(
        "separator",
        ".txt",
        {"kind": "text", "document": "separator", "separator": SEPARATOR},
        lambda texts, source: "".join(f"{text}\n{SEPARATOR}\n" for text in texts),
        _read_separated,
    ),
]


# --- containers -----------------------------------------------------------------------------------


# Of the containers; without one of them there is nothing to compare with.
TOOLS = ("gzip", "bzip2", "xz", "zstd", "lz4")
has_tools = pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)), reason=f"needs the commands {', '.join(TOOLS)}"
)


def _tool(*command: str) -> Callable[[bytes], bytes]:
    """A command-line tool over bytes; what it gives out before an error counts."""
    return lambda content: subprocess.run(command, input=content, capture_output=True).stdout


@dataclass(frozen=True)
class Container:
    """How a file's bytes are wrapped, and the command-line tool that takes them out again, as far
    as it can.
    """

    name: str
    ending: str
    pack: Callable[[bytes], bytes]
    unpack: Callable[[bytes], bytes]
    encoding: str = "utf-8"
    mark: bytes = b""

    @property
    def is_compressed(self) -> bool:
        return bool(self.ending)


def _two_members(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda content: pack(content[: len(content) // 3]) + pack(content[len(content) // 3 :])


CONTAINERS = [
    Container("plain", "", bytes, bytes),
    Container("utf8_mark", "", bytes, bytes, mark=b"\xef\xbb\xbf"),
    Container("utf16_le", "", bytes, bytes, "utf-16-le", b"\xff\xfe"),
    Container("utf16_be", "", bytes, bytes, "utf-16-be", b"\xfe\xff"),
    Container("utf32_le", "", bytes, bytes, "utf-32-le", b"\xff\xfe\0\0"),
    Container("gz", ".gz", gzip.compress, _tool("gzip", "-dc")),
    Container("gz_members", ".gz", _two_members(gzip.compress), _tool("gzip", "-dc")),
    Container("gz_utf16", ".gz", gzip.compress, _tool("gzip", "-dc"), "utf-16-le", b"\xff\xfe"),
    Container("bz2", ".bz2", bz2.compress, _tool("bzip2", "-dc")),
    Container("xz", ".xz", lzma.compress, _tool("xz", "-dc")),
    Container("zst", ".zst", _tool("zstd", "-qc"), _tool("zstd", "-dc")),
    Container("zst_frames", ".zst", _two_members(_tool("zstd", "-qc")), _tool("zstd", "-dc")),
    Container("lz4", ".lz4", _tool("lz4", "-qc"), _tool("lz4", "-dc")),
]


# --- damage ---------------------------------------------------------------------------------------

Damage = Callable[[str, random.Random, Format], str]


def _lines_with(content: str, source: random.Random, line: str) -> str:
    lines = content.split("\n")
    lines.insert(source.randrange(1, max(len(lines), 2)), line)
    return "\n".join(lines)


def _stray_quotes(content: str, source: random.Random, format: Format) -> str:
    for _ in range(source.randint(1, 2)):
        at = source.randrange(content.find("\n") + 1, len(content) + 1)
        content = content[:at] + '"' + content[at:]
    return content


# What happens to the text before it is encoded and packed. Those in HARMLESS leave every document
# as it was.
INSIDE: dict[str, Damage] = {
    "none": lambda content, source, format: content,
    "no_last_newline": lambda content, source, format: content.removesuffix("\n"),
    "crlf": lambda content, source, format: (
        content.replace("\n", "\r\n")
        if not format.holds_lines or "json" in format.ending
        else content
    ),
    "other_ending": lambda content, source, format: content,
    "garbage_line": lambda content, source, format: _lines_with(
        content, source, "%% garbage } ] line"
    ),
    "empty": lambda content, source, format: "",
    "stray_quotes": _stray_quotes,
    "second_header": lambda content, source, format: _lines_with(
        content, source, content.split("\n")[0]
    ),
}
HARMLESS = {"none", "no_last_newline", "crlf", "other_ending"}
# What happens to the bytes, before or after they are packed.
BYTES = ("cut", "flipped")


def damaged_bytes(kind: str, content: bytes, source: random.Random) -> bytes:
    at = source.randrange(len(content))
    if kind == "cut":
        return content[:at]
    return content[:at] + bytes([content[at] ^ 1 << source.randrange(8)]) + content[at + 1 :]


@dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        texts: of the documents, before anything happened to them.
        content: of the file.
        expected: what the independent reader finds in it; those before the first error if it cannot
            resume behind one.
    """

    format: Format
    container: Container
    damage: str
    name: str
    texts: list[str]
    content: bytes
    expected: list[str]


def make_case(format: Format, container: Container, damage: str, seed: int) -> Case:
    source = random.Random(f"{format.name} {container.name} {damage} {seed}")
    texts = make_texts(source, source.randint(1, 30), format.holds_lines)
    written = format.write(texts, source)
    inside, _, where = damage.partition("_bytes_")
    if isinstance(written, str):
        written = INSIDE.get(damage, INSIDE["none"])(written, source, format)
        content = container.mark + written.encode(container.encoding)
    else:
        content = written
    if where == "inside":
        content = damaged_bytes(inside, content, source)
    packed = container.pack(content)
    if where == "outside":
        packed = damaged_bytes(inside, packed, source)
        content = container.unpack(packed)
    ending = ".data" if damage == "other_ending" else format.ending + container.ending
    found = format.read(decoded(content, container) if format.is_text else content)
    return Case(format, container, damage, f"input{ending}", texts, packed, found)


def decoded(content: bytes, container: Container) -> str:
    """The text of a file; what is not of its encoding becomes what no document holds."""
    if content.startswith(container.mark):
        errors = "surrogateescape" if container.encoding == "utf-8" else "replace"
        return content[len(container.mark) :].decode(container.encoding, errors)
    # A damaged mark leaves nothing that says what the rest is.
    return content.decode("utf-8", "surrogateescape")


def cases(seeds: int, damaged_seeds: int) -> Iterator[Case]:
    """Every format in every container with every damage that applies."""
    for format in FORMATS:
        for container in CONTAINERS:
            if not format.is_text and container.encoding != "utf-8":
                continue
            for damage in INSIDE if format.is_text else ["none", "other_ending"]:
                if damage == "second_header" and format.section["kind"] != "csv":
                    continue
                yield from (make_case(format, container, damage, seed) for seed in range(seeds))
            for kind in BYTES:
                for where in ("inside", "outside") if container.is_compressed else ("outside",):
                    yield from (
                        make_case(format, container, f"{kind}_bytes_{where}", seed)
                        for seed in range(damaged_seeds)
                    )
