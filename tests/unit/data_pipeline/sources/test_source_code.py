"""Folders of source code: which files count, by git's own rules, and what a document is called."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from data_pipeline.sources.interface import Document, LeftOut
from data_pipeline.sources.source_code import walk
from pretrain.core.errors import DataError
from tests.support.source_reading import (
    left_out,
    list_units,
    read_all,
    read_units,
    texts,
    write,
)


def section(*folders: object, **fields: object) -> dict[str, object]:
    return {"kind": "source_code", "input": [str(folder) for folder in folders], **fields}


def git_files(folder: Path) -> set[str]:
    """What git would add, as it says itself."""
    settings = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", "init", "-q", str(folder)], check=True, env=os.environ | settings)
    command = [
        "git",
        "-C",
        str(folder),
        "-c",
        "core.excludesFile=",
        "ls-files",
        "-z",
        "--others",
        "--exclude-standard",
    ]
    listed = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | settings
    ).stdout
    return {name for name in listed.split("\0") if name}


def ours(folder: Path) -> list[str]:
    return [path.removeprefix(f"{folder}/") for path in walk(str(folder), respect_gitignore=True)]


def test_gitignore_files_of_every_level_hold_with_negations(tmp_path: Path) -> None:
    write(tmp_path / ".gitignore", "*.log\n!keep.log\n/build/\nsecret*\n# a comment\n\\#odd\n")
    write(tmp_path / "sub/.gitignore", "!debug.log\nlocal.py\n!secret.py\n")
    for name in (
        "a.py",
        "b.log",
        "keep.log",
        "build/x.py",
        "sub/build/x.py",
        "sub/debug.log",
        "sub/local.py",
        "sub/secret.py",
        "secret.py",
        "#odd",
    ):
        write(tmp_path / name, "x")
    write(tmp_path / "local.py", "x")
    found = ours(tmp_path)
    assert set(found) == git_files(tmp_path)
    assert {"a.py", "sub/build/x.py", "sub/debug.log", "sub/secret.py", "local.py"} <= set(found)
    assert not {"b.log", "build/x.py", "sub/local.py", "secret.py", "#odd"} & set(found)
    everything = [
        path.removeprefix(f"{tmp_path}/") for path in walk(str(tmp_path), respect_gitignore=False)
    ]
    assert {"b.log", "build/x.py", "secret.py"} <= set(everything) and not [
        name for name in everything if name.startswith(".git/")
    ]


@pytest.mark.parametrize("seed", range(12))
def test_random_trees_give_the_files_that_git_gives(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    names = ["a", "b", "c.py", "d.log"]
    rules = (
        "a b/ /a *.py !c.py !a a/* **/b !b/ d.* a/**/c.py !*.log b/c.py * a/** !a/c.py ** !** x/a/"
        " !/x/*".split()
    )
    for _ in range(40):
        folders = [source.choice(["a", "b", "x", "y"]) for _ in range(source.randrange(4))]
        place = tmp_path.joinpath(*folders)
        if not any(part.is_file() for part in (place, *place.parents)):
            place.mkdir(parents=True, exist_ok=True)
            name = place / source.choice([*names, ".gitignore"])
            if not name.is_dir():
                name.write_text("\n".join(source.choices(rules, k=3)) + "\n")
    found = ours(tmp_path)
    assert set(found) == git_files(tmp_path)
    assert len(found) == len(set(found))


def test_names_are_stable_and_sorted_whatever_else_is_in_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "repos/one/b.py",
        "repos/one/a/z.py",
        "repos/two/c.py",
        "repos/two/.git/config",
        "repos/one/README",
    ):
        write(Path(name), name)
    both = read_all(section("repos/one/", "repos/two"))
    assert [document.file for document in both] == [
        "repos/one/README",
        "repos/one/a/z.py",
        "repos/one/b.py",
        "repos/two/c.py",
    ]
    assert all(document.id == document.file for document in both if isinstance(document, Document))
    assert read_all(section("repos/two")) == both[3:]
    assert texts(read_all(section("repos/*", suffixes=[".py"]))) == [
        "repos/one/a/z.py",
        "repos/one/b.py",
        "repos/two/c.py",
    ]
    assert texts(read_all(section("repos/two/c.py", "repos"))) == [
        "repos/two/c.py",
        "repos/one/README",
        "repos/one/a/z.py",
        "repos/one/b.py",
    ]
    units = list_units(section("repos"), 20)
    assert len(units) > 1 and read_units(section("repos"), units) == read_all(section("repos"))


def test_large_binary_empty_and_undecodable_files_are_left_out_by_reason(tmp_path: Path) -> None:
    for name, content in {
        "a_large.py": b"x" * 101,
        "b_picture": b"\x89PNG\0\0",
        "c_utf16.py": "text".encode("utf-16"),
        "d_latin.py": b"# caf\xe9",
        "e_empty.py": b"",
        "f_fits.py": b"\xef\xbb\xbf" + b"x" * 97,
    }.items():
        write(tmp_path / name, content)
    results = read_all(section(tmp_path, max_file_bytes=100))
    assert [(Path(bad.path).name[:1], bad.reason, bad.is_bad) for bad in left_out(results)] == [
        ("a", "too_large", False),
        ("b", "binary", False),
        ("c", "binary", False),
        ("d", "invalid_utf8", True),
        ("e", "empty", False),
    ]
    assert texts(results) == ["x" * 97]
    assert LeftOut(
        str(tmp_path / "f_fits.py"), "too_long", detail="longer than 50 bytes"
    ) in read_all(section(tmp_path), max_record_bytes=50)


def test_links_never_lead_out_of_the_folder_or_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "outside.py", "outside")
    write(tmp_path / "in/real.py", "real")
    (tmp_path / "in/out.py").symlink_to(tmp_path / "outside.py")
    (tmp_path / "in/up").symlink_to(tmp_path)
    (tmp_path / "in/again").symlink_to(tmp_path / "in")
    (tmp_path / "in/gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "in/pipe")
    assert texts(read_all(section(tmp_path / "in"))) == ["real"]
    (tmp_path / "door").symlink_to(tmp_path / "in")
    assert [document.id for document in read_all(section(tmp_path / "door"))] == [
        f"{tmp_path}/door/real.py"
    ]


def test_nothing_to_read_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x")
    with pytest.raises(DataError, match=r"holds no file that ends in \.py"):
        list_units(section(tmp_path, suffixes=[".py"]))
    with pytest.raises(DataError, match="matches nothing"):
        list_units(section(tmp_path / "nowhere"))
    units = list_units(section(tmp_path))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match="No such file"):
        read_units(section(tmp_path), units)
