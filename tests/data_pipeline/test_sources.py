"""Which files become documents."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.sources import PythonStdlib, TextFiles
from pretrain.config.errors import ConfigError, DataError


def test_stdlib_holds_modules_and_no_tests_packages_or_build_settings() -> None:
    ids = [document_id for document_id, _ in PythonStdlib().files]
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(ids)
    parts = {part for document_id in ids for part in document_id.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not [part for part in parts if part.startswith(("_sysconfigdata", "config-"))]
    assert ids == sorted(ids)


def test_stdlib_counts_what_it_skips_and_honours_encoding_declarations(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\nname = 'é'\n".encode("latin-1"))
    (tmp_path / "bad.py").write_bytes(b"name = '\xff'\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_good.py").write_text("y = 2\n")
    skipped: Counter[str] = Counter()
    documents = list(PythonStdlib(tmp_path).documents(skipped))
    assert [(document.id, document.text) for document in documents] == [("good.py", "x = 1\n"), ("latin.py", "# coding: latin-1\nname = 'é'\n")]
    assert skipped == {"undecodable": 1, "empty": 1, "unreadable": 1}


def test_text_ids_are_paths_as_given_sorted_and_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my/b.txt", "my/a.txt", "my/deep/c.txt", "my/odd[1].txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    source = TextFiles(["my/**/*.txt", "./my/a.txt", "my/odd[1].txt"])
    assert [document.id for document in source.documents()] == ["my/a.txt", "my/b.txt", "my/deep/c.txt", "my/odd[1].txt"]


def test_text_keeps_line_ends_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r\n")
    assert [document.text for document in TextFiles([str(tmp_path / "dos.txt")]).documents()] == ["one\r\ntwo\r\n"]


def test_text_in_another_encoding_is_read_or_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Käse".encode("latin-1"))
    assert next(TextFiles([str(path)], "latin-1").documents()).text == "Käse"
    with pytest.raises(DataError, match=r"latin\.txt is not utf-8 text at byte 1"):
        list(TextFiles([str(path)]).documents())
    with pytest.raises(ConfigError, match="no encoding 'klingon'"):
        list(TextFiles([str(path)], "klingon").documents())


def test_a_pattern_that_matches_nothing_is_named_even_beside_one_that_does(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"nothing\*"):
        TextFiles([str(tmp_path / "a.txt"), str(tmp_path / "nothing*")])
    with pytest.raises(DataError, match="is a folder"):
        TextFiles([str(tmp_path)])
