"""What a file is, by its first bytes; and of a damaged compressed file all that the command-line
tools give out.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.sources.containers import DamagedStream, open_content
from pretrain.core.errors import ConfigError, DataError
from tests.support.generated_inputs import has_tools
from tests.support.source_reading import left_out, read_all, reasons, texts, write

pytestmark = has_tools
TOOLS = {
    ".gz": (["gzip", "-c"], ["gzip", "-dc"]),
    ".bz2": (["bzip2", "-c"], ["bzip2", "-dc"]),
    ".xz": (["xz", "-c"], ["xz", "-dc"]),
    ".zst": (["zstd", "-qc"], ["zstd", "-dc"]),
    ".lz4": (["lz4", "-qc"], ["lz4", "-dc"]),
}
SKIPPED_FRAME = b"\x53\x2a\x4d\x18\x05\0\0\0notes"


def tool(command: list[str], content: bytes) -> tuple[bytes, bool]:
    done = subprocess.run(command, input=content, capture_output=True)
    return done.stdout, done.returncode == 0


def content_of(path: Path) -> tuple[bytes, DamagedStream | None]:
    """What our stream gives out, and the damage behind it."""
    found = b""
    with path.open("rb") as raw:
        stream = open_content(raw, str(path), None)
        try:
            while block := stream.read(1 << 16):
                found += block
        except DamagedStream as error:
            return found, error
    return found, None


def rows(count: int) -> bytes:
    source = random.Random(count)
    return b"".join(
        b'{"text": "%d %x"}\n' % (number, source.getrandbits(256)) for number in range(count)
    )


@pytest.mark.parametrize("ending", TOOLS)
def test_damaged_streams_give_what_the_tools_give_byte_for_byte(
    tmp_path: Path, ending: str
) -> None:
    pack, unpack = TOOLS[ending]
    source, path = random.Random(ending), tmp_path / f"a{ending}"
    plain = rows(9_000)
    first, second = tool(pack, plain)[0], tool(pack, rows(500))[0]
    contents = [
        first,
        first + second,
        first[:-1],
        first + second[:-9],
        first + second[: len(second) // 2],
    ]
    contents += [(first + second)[: source.randrange(20, len(first))] for _ in range(6)]
    for content in contents:
        path.write_bytes(content)
        found, damage = content_of(path)
        theirs, is_whole = tool(unpack, content)
        assert (
            found.startswith(theirs)
            and (plain + rows(500)).startswith(found)
            and (damage is None) == is_whole
        )


@pytest.mark.parametrize("ending", [".bz2", ".xz", ".zst", ".lz4"])
def test_a_changed_byte_leaves_what_the_tools_give(tmp_path: Path, ending: str) -> None:
    pack, unpack = TOOLS[ending]
    source, path = random.Random(ending), tmp_path / f"a{ending}"
    whole = tool(pack, rows(9_000))[0]
    for _ in range(6):
        content = bytearray(whole)
        content[source.randrange(20, len(content))] ^= 1 << source.randrange(8)
        path.write_bytes(content)
        found, damage = content_of(path)
        theirs, is_whole = tool(unpack, bytes(content))
        assert found.startswith(theirs) and (damage is None) == is_whole
        assert damage is None or 0 <= damage.unread < len(content)


def test_zeros_behind_a_member_are_padding_and_other_bytes_are_damage(tmp_path: Path) -> None:
    for ending, pack in ((".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)):
        path = tmp_path / f"a{ending}"
        path.write_bytes(pack(b"one\n") + b"\0" * 70_000 + pack(b"two\n") + b"\0" * 8)
        assert content_of(path) == (b"one\ntwo\n", None)
        path.write_bytes(pack(b"one\n") + b"rubbish")
        found, damage = content_of(path)
        assert found == b"one\n" and damage is not None


def test_frames_to_skip_are_skipped(tmp_path: Path) -> None:
    for ending, codec in ((".zst", "zstd"), (".lz4", "lz4")):
        frame = pyarrow.compress(b"one\n", codec=codec, asbytes=True)
        path = tmp_path / f"a{ending}"
        path.write_bytes(SKIPPED_FRAME + frame + SKIPPED_FRAME + frame)
        assert content_of(path) == (b"one\none\n", None)


def test_the_name_does_not_matter(tmp_path: Path) -> None:
    content = b'{"text": "one"}\n{"text": "two"}\n'
    packed = [content, gzip.compress(content), bz2.compress(content), lzma.compress(content)]
    packed += [tool(TOOLS[ending][0], content)[0] for ending in (".zst", ".lz4")]
    for number, data in enumerate(packed):
        for ending in ("", ".gz", ".zst", ".jsonl", ".xz", ".bz2", ".lz4"):
            path = write(tmp_path / f"{number}{ending}", data)
            assert texts(read_all({"kind": "jsonl", "input": [path]}, 7)) == ["one", "two"]
            assert len(read_all({"kind": "text", "document": "line", "input": [path]}, 7)) == 2


def test_an_empty_file_that_is_named_compressed_is_a_damaged_one(tmp_path: Path) -> None:
    for ending in TOOLS:
        assert reasons(
            read_all({"kind": "jsonl", "input": [write(tmp_path / f"a{ending}", b"")]})
        ) == ["damaged_compression"]
    assert read_all({"kind": "jsonl", "input": [write(tmp_path / "a.jsonl", b"")]}) == []


def tar_of(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def zip_of(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def table(write_table: str) -> bytes:
    content = pyarrow.table({"text": ["one", "two"]})
    stream = io.BytesIO()
    if write_table == "parquet":
        pyarrow.parquet.write_table(content, stream)
    else:
        kind = pyarrow.ipc.new_file if write_table == "arrow" else pyarrow.ipc.new_stream
        with kind(stream, content.schema) as writer:
            writer.write_table(content)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (zip_of("a.jsonl", b"{}"), "a zip archive"),
        (tar_of("a.jsonl", b'{"text": "x"}\n'), "a tar archive"),
        (gzip.compress(tar_of("a.jsonl", b'{"text": "x"}\n')), "a tar archive"),
        (table("parquet"), "a Parquet file"),
        (gzip.compress(table("parquet")), "a Parquet file"),
        (table("arrow"), "an Arrow file"),
        (table("stream"), "an Arrow stream"),
        (gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "compressed twice"),
    ],
    # Names, since gzip writes the time of day: identifiers must be equal in every worker.
    ids=[
        "zip",
        "tar",
        "tar in gzip",
        "Parquet",
        "Parquet in gzip",
        "Arrow",
        "stream",
        "gzip in gzip",
    ],
)
def test_what_holds_no_lines_is_refused_with_what_it_is(
    tmp_path: Path, content: bytes, what: str
) -> None:
    path = write(tmp_path / "a.txt", content)
    for section in (
        {"kind": "jsonl"},
        {"kind": "csv"},
        {"kind": "text"},
        {"kind": "text", "document": "line"},
    ):
        with pytest.raises(DataError, match=rf"a\.txt is {what}[^\n]*$"):
            read_all({**section, "input": [path]})


def test_texts_that_begin_like_another_kind_are_texts(tmp_path: Path) -> None:
    for content in (
        "PAR1 is a mark\n",
        "BZh9 is one too\n",
        "PK stands for a name\n",
        "ORC\n",
        "ustar\n" * 100,
    ):
        assert texts(read_all({"kind": "text", "input": [write(tmp_path / "a.txt", content)]})) == [
            content
        ]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_says_the_encoding_in_every_kind(tmp_path: Path, encoding: str) -> None:
    def encoded(text: str) -> bytes:
        return ("\ufeff" + text).encode(encoding)

    path = write(
        tmp_path / "a",
        encoded(
            "".join(
                json.dumps({"text": text}, ensure_ascii=False) + "\n"
                for text in ("é", "中\u0a0a", "😀")
            )
        ),
    )
    assert texts(read_all({"kind": "jsonl", "input": [path]}, 7)) == ["é", "中\u0a0a", "😀"]
    path = write(tmp_path / "a", gzip.compress(encoded("é\n中\u0a0a\r\n😀")))
    assert texts(read_all({"kind": "text", "document": "line", "input": [path]}, 7)) == [
        "é",
        "中\u0a0a",
        "😀",
    ]
    assert texts(
        read_all(
            {"kind": "csv", "input": [write(tmp_path / "a", encoded('n\ttext\r\n1\té "x"\r\n'))]}
        )
    ) == ['é "x"']
    assert texts(
        read_all({"kind": "text", "input": [write(tmp_path / "a", encoded("é\r\n"))]})
    ) == ["é\r\n"]


def test_what_the_encoding_does_not_hold_costs_its_own_record_alone(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}).encode("utf-16-le") for text in ("one", "bad", "three")]
    lines[1] = lines[1].replace("a".encode("utf-16-le"), b"\x00\xd8")
    content = b"\xff\xfe" + "\n".encode("utf-16-le").join(lines) + "\n".encode("utf-16-le") + b"x"
    results = read_all({"kind": "jsonl", "input": [write(tmp_path / "a", content)]})
    assert (texts(results), reasons(results)) == (
        ["one", "three"],
        ["invalid_utf8", "invalid_utf8"],
    )


def test_another_encoding_can_be_named_and_is_advised(tmp_path: Path) -> None:
    record = '{"text": "Käse “fein”"}\n'.encode("cp1252")
    path = write(tmp_path / "a.jsonl", record * 3)
    results = read_all({"kind": "jsonl", "input": [path]})
    assert reasons(results) == ["invalid_utf8"] * 3 and "--encoding" in left_out(results)[0].detail
    assert (
        texts(read_all({"kind": "jsonl", "input": [path], "encoding": "cp1252"}, 7))
        == ["Käse “fein”"] * 3
    )
    path = write(tmp_path / "a.csv", b"text\nK\xe4se\n")
    assert texts(read_all({"kind": "csv", "input": [path], "encoding": "latin-1"})) == ["Käse"]
    for name in ("klingon", "base64", "idna", "undefined"):
        with pytest.raises(ConfigError, match=f"no encoding '{name}'"):
            read_all({"kind": "csv", "input": [path], "encoding": name})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_named_encoding_of_either_byte_order_is_that_of_the_mark_or_little_endian(
    tmp_path: Path, encoding: str
) -> None:
    line = json.dumps({"text": "é 中"}, ensure_ascii=False) + "\n"
    for content in (
        line.encode(f"{encoding}-le"),
        ("\ufeff" + line).encode(f"{encoding}-be"),
        line.encode(encoding),
    ):
        for stored in (content, gzip.compress(content)):
            assert texts(
                read_all(
                    {
                        "kind": "jsonl",
                        "input": [write(tmp_path / "a", stored)],
                        "encoding": encoding,
                    }
                )
            ) == ["é 中"]
    wrong = write(tmp_path / "a", line * 3)
    assert set(reasons(read_all({"kind": "jsonl", "input": [wrong], "encoding": encoding}))) <= {
        "invalid_json",
        "invalid_utf8",
    }
