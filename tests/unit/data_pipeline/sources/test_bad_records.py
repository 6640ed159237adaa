"""Records that cannot be read are left out with a reason and their place; whatever the bytes,
nothing else happens.
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from data_pipeline.sources.interface import REASONS, LeftOut
from pretrain.core.errors import DataError, PipelineError
from tests.support.source_reading import (
    left_out,
    list_units,
    read_all,
    read_units,
    reasons,
    texts,
    write,
)


def jsonl(path: str | Path, **fields: Any) -> dict[str, Any]:
    return {"kind": "jsonl", "input": [str(path)], **fields}


def lines(path: str | Path) -> dict[str, Any]:
    return {"kind": "text", "document": "line", "input": [str(path)]}


def whole(path: str | Path) -> dict[str, Any]:
    return {"kind": "text", "input": [str(path)]}


def compress_zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


BAD_LINES = {
    b'{"text": "caf\xe9"}': "invalid_utf8",
    b'{"text": "a\\u0000b"}': "nul",
    b'{"text": "a\0b"}': "invalid_json",
    b'{"text": "half"': "invalid_json",
    b"no json": "invalid_json",
    b'{"body": "x"}': "missing_field",
    b'{"text": null}': "missing_field",
    b'{"text": 5}': "not_a_string",
    b'{"text": ["x"]}': "not_a_string",
    b'["text"]': "not_an_object",
    b"7": "not_an_object",
    b'{"text": ""}': "empty",
    b'{"text": " \\n\\t"}': "empty",
    b'{"text": "\xc3\xa9\\u0000b"}': "nul",
    b'{"text": "\\ud83d"}': "lone_surrogate",
    b'{"text": "\\ud83d\\u0000"}': "lone_surrogate",
    b'{"text": "' + b"x" * 1000 + b'"}': "too_long",
    b"[" * 900: "invalid_json",
}
GOOD_LINES = {
    b'{"text": "plain"}': "plain",
    b'{"text": "\\ud83d\\ude00 \xf0\x9f\x98\x80"}': "😀 😀",
    b'{"text": "nan", "score": NaN, "other": -Infinity}': "nan",
    b'{"text": "dos"}\r': "dos",
    b' {"text": "spaces"} ': "spaces",
    b'{"text": "big", "n": 123456789012345678901234567890}': "big",
}


@pytest.mark.parametrize("unit_bytes", [1 << 20, 37])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_bad_line_is_left_out_with_its_reason_and_place(
    tmp_path: Path, suffix: str, unit_bytes: int
) -> None:
    rows = [*BAD_LINES, *GOOD_LINES, b"", b"  "]
    random.Random(1).shuffle(rows)
    content = b"\n".join(rows)
    encode = {"": bytes, ".gz": gzip.compress, ".zst": compress_zstd}[suffix]
    results = read_all(
        jsonl(write(tmp_path / f"a.jsonl{suffix}", encode(content))),
        unit_bytes,
        max_record_bytes=999,
    )
    found = []
    for bad in left_out(results):
        assert bad.offset is not None and bad.is_bad
        line = content[bad.offset :].split(b"\n", 1)[0]
        found.append((line, bad.reason))
        if suffix or unit_bytes > len(content):
            assert bad.line == content[: bad.offset].count(b"\n") + 1
    assert found == [(row, BAD_LINES[row]) for row in rows if row in BAD_LINES]
    assert texts(results) == [GOOD_LINES[row] for row in rows if row in GOOD_LINES]
    assert {bad.reason for bad in left_out(results)} <= set(REASONS)


def test_brackets_a_hundred_thousand_deep_are_one_bad_line(tmp_path: Path) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    inside = b'{"text": "x", "more": ' + deep + b"}"
    results = read_all(
        jsonl(write(tmp_path / "a.jsonl", b"\n".join([deep, b'{"text": "after"}', inside])))
    )
    assert (texts(results), reasons(results)) == (["after"], ["too_deep", "too_deep"])


def test_bad_lines_of_text_are_left_out_too(tmp_path: Path) -> None:
    content = "\ufeffgood\r\n".encode() + b"caf\xe9\nnul\0\n\n" + b"x" * 50 + b"\nlast"
    results = read_all(lines(write(tmp_path / "a.txt", content)), max_record_bytes=40)
    assert texts(results) == ["good", "last"]
    assert [(bad.reason, bad.line, bad.offset) for bad in left_out(results)] == [
        ("invalid_utf8", 2, 9),
        ("nul", 3, 14),
        ("too_long", 5, 20),
    ]
    whole_file = read_all(whole(tmp_path / "a.txt"), max_record_bytes=40)
    assert reasons(whole_file) == ["too_long"]


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b"\r\n\r\n"])
def test_files_with_nothing_in_them_give_nothing(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "a.jsonl", content)
    assert read_all(jsonl(path)) == [] and read_all(lines(path)) == []
    assert reasons(read_all(whole(path))) == ["empty"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_short_gives_what_stands_before_the_damage(
    tmp_path: Path, suffix: str
) -> None:
    encode = gzip.compress if suffix == ".gz" else compress_zstd
    source = random.Random(0)
    rows = [
        json.dumps({"text": f"{number} {source.getrandbits(256):x}"}).encode()
        for number in range(20_000)
    ]
    full = encode(b"\n".join(rows) + b"\n")
    for content in (
        full[: len(full) // 2],
        full + encode(b'{"text": "more"}\n')[:12],
        full + b"rubbish",
    ):
        path = write(tmp_path / f"a.jsonl{suffix}", content)
        results = read_all(jsonl(path))
        assert reasons(results) == ["damaged_compression"]
        found = [int(text.split()[0]) for text in texts(results)]
        assert found == list(range(len(found))) and len(found) > 5_000
        (bad,) = left_out(results)
        assert bad.line == len(found) + 1 and bad.detail
    assert texts(read_all(jsonl(write(tmp_path / f"a.jsonl{suffix}", full)))) == [
        json.loads(row)["text"] for row in rows
    ]


def test_a_folder_that_vanishes_between_listing_and_reading_is_one_sentence(tmp_path: Path) -> None:
    for kind, name in ((jsonl, "jsonl/a.jsonl"), (lines, "lines/a.txt"), (whole, "whole/a.txt.gz")):
        path = Path(write(tmp_path / name, '{"text": "x"}\n'))
        units = list_units(kind(path))
        path.unlink()
        path.parent.rmdir()
        with pytest.raises(
            DataError, match=r"^[^\n]+ cannot be read \(No such file or directory\): [^\n]+$"
        ):
            read_units(kind(path), units)


def read_apart(kind: str, path: Path, unit_bytes: int) -> tuple[int, int]:
    """How many megabytes a process that reads a file ever held, and how many records it left out as
    too long.
    """
    script = """if True:
        import sys
        from tests.support.source_reading import SECTION, peak_megabytes
        from data_pipeline.sources.interface import ReadContext, open_source
        source = open_source(SECTION.validate_python({"kind": sys.argv[1], "input": [sys.argv[2]]}), ReadContext("all", 64 << 20))
        results = [result.reason for unit in source.units(int(sys.argv[3])) for result in source.read(unit)]
        assert set(results) <= {"too_long"}, results
        print(peak_megabytes(), len(results))
    """
    command = [sys.executable, "-c", script, kind, str(path), str(unit_bytes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    megabytes, count = done.stdout.split()
    return int(megabytes), int(count)


def write_long_line(path: Path, megabytes: int, start: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(start)
        for _ in range(megabytes):
            stream.write(b"x" * (1 << 20))
        stream.write(b'"}\n')


@pytest.mark.parametrize("megabytes", [300, pytest.param(1024, marks=pytest.mark.full)])
def test_a_line_of_any_length_is_left_out_without_being_held(
    tmp_path: Path, megabytes: int
) -> None:
    write_long_line(tmp_path / "a.jsonl", megabytes, b'{"text": "')
    # Small units too: what begins inside the line is passed over, not read to the line's end by
    # each unit.
    for unit_bytes in (2 << 30, 1 << 22):
        peak, count = read_apart("jsonl", tmp_path / "a.jsonl", unit_bytes)
        assert count == 1 and peak < 250
    write_long_line(tmp_path / "a.csv", megabytes, b'text\n"')
    peak, count = read_apart("csv", tmp_path / "a.csv", 1 << 22)
    assert count >= 1 and peak < 250


GOOD = {
    "jsonl": (
        "".join(
            json.dumps({"text": text, "id": number}) + "\n"
            for number, text in enumerate(["one", "zwei é", "three 😀", "4\n4"])
        ).encode()
    ),
    "csv": 'id,text\n1,one\n2,"two, ""quoted""\nand more"\r\n3,é\n'.encode(),
    "text": "one\nzwei é\r\n<|end|>\nthree 😀\n".encode(),
}
SECTIONS: dict[str, list[dict[str, Any]]] = {
    "jsonl": [{"kind": "jsonl"}, {"kind": "jsonl", "id_field": "id", "metadata_fields": ["id"]}],
    "csv": [{"kind": "csv"}, {"kind": "csv", "delimiter": ";"}],
    "text": [
        {"kind": "text"},
        {"kind": "text", "document": "line"},
        {"kind": "text", "document": "separator", "separator": "<|end|>"},
    ],
}


def mutate(content: bytes, source: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(source.randint(1, 4)):
        at, other = source.randrange(len(changed) + 1), source.randrange(len(changed) + 1)
        match source.randrange(5):
            case 0 if at < len(changed):
                changed[at] ^= 1 << source.randrange(8)
            case 1:
                del changed[at : at + source.randint(1, 5)]
            case 2:
                changed[at:at] = source.choice(
                    [
                        b"\0",
                        b'"',
                        b"\n",
                        b"\r",
                        b"\xff",
                        b"\xef\xbb\xbf",
                        b"[" * 50,
                        b"{",
                        b"\xed\xa0\x80",
                        b",",
                        b"\\u0000",
                    ]
                )
            case 3 if source.random() < 0.3:
                del changed[at:]
            case 4 if at < len(changed) and other < len(changed):
                changed[at], changed[other] = changed[other], changed[at]
    return bytes(changed)


def test_ten_thousand_mutated_files_give_documents_or_reasons_and_nothing_else(
    tmp_path: Path,
) -> None:
    source, seen, errors = random.Random(7), Counter[str](), 0
    for number in range(10_000):
        kind = source.choice(list(GOOD))
        suffix, encode = source.choice(
            [("", bytes), ("", bytes), (".gz", gzip.compress), (".zst", compress_zstd)]
        )
        # Half of the compressed files are damaged outside, half inside.
        outside = source.random() < 0.5
        content = (
            mutate(encode(GOOD[kind]), source) if outside else encode(mutate(GOOD[kind], source))
        )
        path = tmp_path / f"a.{kind}{suffix}"
        path.write_bytes(content)
        section = source.choice(SECTIONS[kind]) | {"input": [str(path)]}
        try:
            results = read_all(
                section,
                source.choice([7, 1 << 20]),
                max_record_bytes=source.choice([10, 60, 1 << 20]),
            )
        except PipelineError as error:
            assert "\n" not in str(error), number
            errors += 1
            continue
        for result in results:
            if isinstance(result, LeftOut):
                seen[result.reason] += 1
            else:
                assert (
                    result.text.strip() and "\0" not in result.text and result.text.encode("utf-8")
                )
                seen["document"] += 1
    assert set(seen) <= set(REASONS) | {"document"}
    assert errors > 100 and seen["document"] > 5_000
    expected = {
        "too_long",
        "invalid_utf8",
        "nul",
        "invalid_json",
        "missing_field",
        "damaged_compression",
        "field_count",
        "invalid_csv",
        "empty",
    }
    assert expected <= set(seen), seen
