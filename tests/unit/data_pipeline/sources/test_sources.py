"""Which files become which documents, for the kinds that need no package of their own; and that any
cut into units gives the same.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.sources.config import JsonlSource, SourceConfig
from data_pipeline.sources.interface import Document, LeftOut, ReadContext, Source, open_source
from pretrain.core.errors import ConfigError, DataError
from pretrain.core.registry import kinds_of
from tests.support.source_reading import (
    left_out,
    list_units,
    read_all,
    read_units,
    texts,
    write,
)


def compress_zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def test_every_kind_of_the_schema_has_a_reader() -> None:
    kinds = kinds_of(SourceConfig)
    assert len(kinds) == 10
    assert all(issubclass(kind.implementing_class(), Source) for kind in kinds)


def test_importing_the_sources_loads_no_heavy_package() -> None:
    script = (
        "import sys; from data_pipeline.sources.config import SourceConfig;"
        " from pretrain.core.registry import kinds_of;"
        " assert [kind.implementing_class() for kind in kinds_of(SourceConfig)];"
        " print([name for name in ('pyarrow', 'datasets', 'pathspec', 'torch', 'numpy')"
        " if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True
        ).stdout
        == "[]\n"
    )


def test_stdlib_holds_modules_and_no_tests_packages_or_build_settings() -> None:
    section = {"kind": "python_stdlib"}
    units = list_units(section, 4 << 20)
    root = Path(sysconfig.get_path("stdlib"))
    ids = [Path(path).relative_to(root).as_posix() for unit in units for path in unit.files]
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(ids)
    parts = {part for document_id in ids for part in document_id.split("/")}
    assert not parts & {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
    }
    assert not [part for part in parts if part.startswith(("_sysconfigdata", "config-"))]
    assert ids == sorted(ids)
    first = [result for result in read_units(section, units[:1]) if isinstance(result, Document)]
    assert all(
        document.key is None and document.file == str(root / document.id) for document in first
    )


def test_text_ids_are_paths_as_given_sorted_and_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my/b.txt", "my/a.txt", "my/deep/c.txt", "my/odd[1].txt"):
        write(Path(name), name)
    results = read_all({"kind": "text", "input": ["my/**/*.txt", "./my/a.txt", "my/odd[1].txt"]})
    assert [(document.id, document.file) for document in results] == [
        (name, name) for name in ("my/a.txt", "my/b.txt", "my/deep/c.txt", "my/odd[1].txt")
    ]


def test_text_keeps_line_ends_as_they_are(tmp_path: Path) -> None:
    assert texts(
        read_all({"kind": "text", "input": [write(tmp_path / "dos.txt", "one\r\ntwo\r\n")]})
    ) == ["one\r\ntwo\r\n"]


def test_text_in_another_encoding_is_read_or_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "latin.txt", "Käse".encode("latin-1"))
    assert texts(read_all({"kind": "text", "input": [path], "encoding": "latin-1"})) == ["Käse"]
    (bad,) = left_out(read_all({"kind": "text", "input": [path]}))
    assert (bad.path, bad.reason) == (path, "invalid_utf8") and "byte 1" in bad.detail
    (bad,) = left_out(read_all({"kind": "text", "input": [path], "encoding": "ascii"}))
    assert bad.reason == "undecodable"
    with pytest.raises(ConfigError, match="no encoding 'klingon'"):
        read_all({"kind": "text", "input": [path], "encoding": "klingon"})
    with pytest.raises(ConfigError, match="cannot be distinguished"):
        read_all({"kind": "text", "input": [path], "encoding": "utf-16", "document": "line"})


def test_text_is_cut_at_separator_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.txt",
        "<|end|>\none\nmore\n<|end|>\r\n\ntwo\n<|end|>\n<|end|>\nnot <|end|>\nthree",
    )
    results = read_all(
        {"kind": "text", "input": [path], "document": "separator", "separator": "<|end|>"}
    )
    assert texts(results) == ["one\nmore\n", "\ntwo\n", "not <|end|>\nthree\n"]
    content = Path(path).read_bytes()
    for result in results:
        assert content[int(result.id.rsplit(":", 1)[1]) :].startswith(
            result.text.rstrip("\n").encode()
        )


def test_a_pattern_that_matches_nothing_is_named_even_beside_one_that_does(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a")
    with pytest.raises(DataError, match=r"nothing\*"):
        list_units({"kind": "text", "input": [path, str(tmp_path / "nothing*")]})
    with pytest.raises(DataError, match="holds no files of JSON lines"):
        list_units({"kind": "jsonl", "input": [str(tmp_path)]})


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b\udcff.txt").write_text("a")
    with pytest.raises(DataError, match=r"b\\xff\.txt' is not UTF-8"):
        list_units({"kind": "text", "input": [str(tmp_path / "*")]})


def test_jsonl_reaches_into_records_and_keeps_id_and_metadata(tmp_path: Path) -> None:
    records = [
        {"doc": {"text": "one", "id": 7}, "url": "u"},
        {"doc": {"text": "two", "id": "b"}},
        {"doc": {"text": "three"}},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    results = read_all(
        {
            "kind": "jsonl",
            "input": [path],
            "text_field": "doc.text",
            "id_field": "doc.id",
            "metadata_fields": ["url"],
        }
    )
    assert results[:2] == [
        Document("one", "7", "7", {"url": "u"}),
        Document("two", "b", "b", {"url": None}),
    ]
    assert [(bad.reason, bad.line) for bad in left_out(results)] == [("bad_id", 3)]


@pytest.mark.parametrize("kind", ["jsonl", "line", "csv"])
def test_compressed_files_give_what_plain_ones_give(tmp_path: Path, kind: str) -> None:
    lines = [
        json.dumps({"text": f"number {number}"}) if kind == "jsonl" else f"number {number}"
        for number in range(50)
    ]
    content = "\n".join((["text"] if kind == "csv" else []) + lines).encode()
    section = {"kind": "text", "document": "line"} if kind == "line" else {"kind": kind}
    found = []
    for suffix, encoded in (
        ("", content),
        (".gz", gzip.compress(content)),
        (".zst", compress_zstd(content)),
    ):
        found.append(
            texts(read_all(section | {"input": [write(tmp_path / f"a.{kind}{suffix}", encoded)]}))
        )
    # Compressed files may be several streams, some of them empty, one after the other.
    for suffix, encode in ((".gz", gzip.compress), (".zst", compress_zstd)):
        parts = b"".join(encode(part) for part in (b"", content[:100], b"", content[100:]))
        found.append(
            texts(read_all(section | {"input": [write(tmp_path / f"parts.{kind}{suffix}", parts)]}))
        )
    assert found == [[f"number {number}" for number in range(50)]] * 5


LINES = st.lists(
    st.sampled_from(
        [
            b"",
            b"a",
            b"long line of words",
            "é中😀".encode(),
            b"\r",
            b" ",
            b"\xff",
            b'{"text": "x"}',
            b"\xef\xbb\xbfb",
        ]
    ),
    max_size=8,
)
ENDS = st.sampled_from([b"\n", b"\r\n"])
CUTS = settings(max_examples=250, deadline=None)


@CUTS
@given(LINES, ENDS, st.booleans(), st.booleans(), st.integers(1, 40))
def test_any_cut_gives_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    end: bytes,
    has_mark: bool,
    is_closed: bool,
    unit_bytes: int,
) -> None:
    content = (b"\xef\xbb\xbf" if has_mark else b"") + end.join(lines) + (end if is_closed else b"")
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_bytes(content)
    for section in (
        {"kind": "text", "document": "line", "input": [str(path)]},
        {"kind": "jsonl", "input": [str(path)]},
    ):
        whole = read_all(section, 1 << 20)
        pieces = read_all(section, unit_bytes)
        # Lines are counted from each unit's own start; everything else is the same.
        assert [
            part._replace(line=None) if isinstance(part, LeftOut) else part for part in pieces
        ] == [part._replace(line=None) if isinstance(part, LeftOut) else part for part in whole]


@CUTS
@given(LINES, ENDS, st.booleans(), st.integers(1, 40))
def test_lines_are_numbered_on_from_unit_to_unit(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    end: bytes,
    is_closed: bool,
    unit_bytes: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / "numbered.jsonl"
    path.write_bytes(end.join(lines) + (end if is_closed else b""))
    source = open_source(JsonlSource(kind="jsonl", input=[str(path)]), ReadContext("all"))
    whole = [
        bad.line
        for bad in read_all({"kind": "jsonl", "input": [str(path)]})
        if isinstance(bad, LeftOut)
    ]
    numbered, before = [], 0
    for unit in source.units(unit_bytes):
        numbered += [before + bad.line for bad in source.read(unit) if isinstance(bad, LeftOut)]
        before += source.lines_read
    assert numbered == whole


def test_units_that_left_a_gap_would_be_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "".join(f"line {number}\n" for number in range(30)))
    section = {"kind": "text", "document": "line", "input": [path]}
    units = list_units(section, 50)
    assert len(units) > 3
    assert read_units(section, units) == read_all(section)
    assert read_units(section, units[:1] + units[2:]) != read_all(section)


def test_lines_that_cross_the_blocks_of_reading_stay_whole(tmp_path: Path) -> None:
    lines = ["x" * length for length in (300_000, 5, 262_143, 262_144, 1, 700_000, 262_143)]
    path = write(tmp_path / "a.txt", "\n".join(lines))
    section = {"kind": "text", "document": "line", "input": [path]}
    for unit_bytes in (1 << 30, 262_144, 100_000):
        assert [len(text) for text in texts(read_all(section, unit_bytes))] == [
            len(line) for line in lines
        ]
