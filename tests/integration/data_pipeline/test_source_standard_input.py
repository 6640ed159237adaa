"""Standard input: read once, kept, and refused where there is nothing to read."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.sources.interface import Document
from pretrain.core.errors import ConfigError, DataError
from tests.support.source_reading import left_out, list_units, read_all, texts, write

SCRIPT = """if True:
    import sys
    from tests.support.source_reading import read_all
    for result in read_all({"kind": "stdin", "format": "line"}, 10, spool=sys.argv[1]):
        print(result.id, result.text)
"""


def pipe(content: bytes, spool: Path) -> str:
    command = [sys.executable, "-c", SCRIPT, str(spool)]
    done = subprocess.run(command, input=content, check=True, capture_output=True)
    return done.stdout.decode()


def test_a_pipe_is_kept_and_a_second_run_needs_none(tmp_path: Path) -> None:
    spool = tmp_path / "staging" / "stdin"
    first = pipe(b"one\ntwo words\nthree\n", spool)
    assert first == "stdin:0 one\nstdin:4 two words\nstdin:14 three\n"
    assert pipe(b"", spool) == first
    assert [path.name for path in spool.parent.iterdir()] == ["stdin"]


@pytest.mark.parametrize("change", ["other", "longer", "shorter", "late"])
def test_what_is_piped_counts_and_not_what_another_build_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    lines = [f"line number {number}" for number in range(100_000)]  # of several blocks
    spool = tmp_path / "spool"
    spool.write_text("\n".join(lines))
    os.utime(spool, ns=(1, 1))
    piped = {
        "other": ["else"],
        "longer": [*lines, "more"],
        "shorter": lines[:-1],
        "late": [*lines[:-1], "else"],
    }[change]
    for content, is_kept in ((lines, True), (piped, False)):
        with open(write(tmp_path / "piped", "\n".join(content))) as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            assert texts(read_all({"kind": "stdin", "format": "line"}, spool=str(spool))) == content
        assert (spool.stat().st_mtime_ns == 1) == is_kept
    assert not Path(f"{spool}.partial").exists()


def test_a_copy_that_was_cut_short_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    write(tmp_path / "stdin.partial", "half of a li")
    assert pipe(b"whole\n", tmp_path / "stdin") == "stdin:0 whole\n"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"format": "jsonl", "text_field": "t"},
            [Document('{"text": "x"}', "stdin:0"), Document("b", "stdin:36")],
        ),
        (
            {"format": "jsonl", "text_field": "t", "id_field": "id"},
            [Document('{"text": "x"}', "7", "7")],
        ),
        (
            {"format": "text"},
            [Document('{"t": "{\\"text\\": \\"x\\"}", "id": 7}\n{"t": "b"}\nbad\n', "stdin")],
        ),
    ],
)
def test_names_do_not_depend_on_where_the_copy_lies(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, str],
    expected: list[Document],
) -> None:
    with open(
        write(tmp_path / "piped", '{"t": "{\\"text\\": \\"x\\"}", "id": 7}\n{"t": "b"}\nbad\n')
    ) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        results = read_all({"kind": "stdin", **fields}, 1, spool=str(tmp_path / "odd[1]"))
    assert [result for result in results if isinstance(result, Document)] == expected
    assert {bad.path for bad in left_out(results)} <= {"stdin"}


def test_a_terminal_and_an_empty_pipe_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = str(tmp_path / "spool")
    ours, theirs = pty.openpty()
    with open(ours, "rb"), open(theirs, encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        with pytest.raises(ConfigError, match="is no pipe"):
            list_units({"kind": "stdin"}, spool=spool)
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(DataError, match="standard input was empty"):
            list_units({"kind": "stdin"}, spool=spool)
    assert not os.path.exists(spool)


def test_records_without_the_text_field_are_refused_by_the_pipes_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(write(tmp_path / "piped", '{"body": "x"}\n')) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(
            DataError,
            match=(
                r"no record of stdin has a text there \(no 'text' among body, perhaps 'body'\):"
                r" name its field with --text-field"
            ),
        ):
            list_units({"kind": "stdin"}, spool=str(tmp_path / "spool"))


def test_text_that_is_not_there_again_is_read_from_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = write(tmp_path / "spool", "kept\n")
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert texts(read_all({"kind": "stdin", "format": "line"}, spool=spool)) == ["kept"]
