"""Folders as people have them: what they are taken for, what of them is read, and what is refused
in one sentence.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.sources.folder_walk import say
from data_pipeline.sources.guess import sources_of
from pretrain.core.errors import ConfigError, DataError, PipelineError
from tests.support.source_reading import read_all, reasons, texts, write

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid"
    " sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


NOBODY = 65534


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    say.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


def write_rows(path: Path, *rows: str) -> None:
    """A file of records of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": rows}), path)
    elif path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    else:
        path.write_text("\n".join(["text", *rows]) + "\n")


def read(folder: Path, kind: str | None = None, **options: Any) -> tuple[list[str], list[str]]:
    """Kinds of the sections that a folder becomes, and all texts."""
    sections = sources_of([str(folder)], kind, **options).values()
    return [section["kind"] for section in sections], [
        text for section in sections for text in texts(read_all(section))
    ]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json", "csv", "tsv"])
def test_side_files_among_data_are_left_out_and_said_once(
    tmp_path: Path, ending: str, said: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path / f"data/train-00000-of-00001.{ending}", "one", "two")
    for name in (
        "README.md",
        "LICENSE",
        ".gitattributes",
        "dataset_infos.json",
        "SHA256SUMS",
        "data/a.md5",
        "notes/README.md",
        ".git/x.jsonl",
    ):
        write(tmp_path / name, "no")
    kinds, found = read(tmp_path)
    assert found == ["one", "two"]
    read(tmp_path)
    (sentence,) = [record.getMessage() for record in said.records]
    assert (
        "1 of 7 files are read (split train); not read: 6 of side files, such as LICENSE"
        in sentence
    )
    expected = {"json": "jsonl", "tsv": "csv"}.get(ending, ending)
    assert kinds == [expected]


def test_one_command_names_folders_of_several_kinds(tmp_path: Path) -> None:
    write_rows(tmp_path / "a/x.csv", "comma")
    write_rows(tmp_path / "b/x.tsv", "tab")
    write(tmp_path / "c/main.py", "code")
    write(tmp_path / "d/notes.txt", "notes")
    sections = sources_of([str(tmp_path / name) for name in "abcd"], None)
    assert {name: texts(read_all(section)) for name, section in sections.items()} == {
        "csv": ["comma"],
        "tsv": ["tab"],
        "source_code": ["code"],
        "text": ["notes"],
    }


def test_a_real_mixture_is_refused_with_what_was_found_and_each_format_reads_its_own(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    for number in range(40):
        write(tmp_path / f"m{number}.py", "code")
    for number in range(3):
        write_rows(tmp_path / f"{number}.parquet", f"row {number}")
    with pytest.raises(
        ConfigError,
        match=(
            r"3 of Parquet, 40 of source code\): choose with --format parquet or --format"
            r" source_code"
        ),
    ):
        read(tmp_path)
    assert read(tmp_path, "parquet") == (["parquet"], ["row 0", "row 1", "row 2"])
    assert "not read: 40 of source code" in said.text
    assert read(tmp_path, "source_code")[1] == ["code"] * 40
    write_rows(tmp_path / "x/a.jsonl", "line")
    write_rows(tmp_path / "x/b.csv", "comma")
    with pytest.raises(
        ConfigError,
        match=r"\(1 of JSON lines, 1 of CSV\): choose with --format csv or --format jsonl",
    ):
        read(tmp_path / "x")
    assert read(tmp_path / "x", "jsonl")[1] == ["line"] and read(tmp_path / "x", "csv")[1] == [
        "comma"
    ]
    with pytest.raises(
        DataError, match=r"holds no files of Parquet \(the folder has 1 of CSV, 1 of JSON lines\)"
    ):
        read(tmp_path / "x", "parquet")


def test_every_file_of_a_text_folder_is_a_document_or_a_line(tmp_path: Path) -> None:
    for name in ("my-test-of-strength.txt", "training.md", "b/README.md", "c.txt"):
        write(tmp_path / name, f"{name}\nline 2\n")
    names = ["b/README.md", "c.txt", "my-test-of-strength.txt", "training.md"]
    write(tmp_path / "README.md", "about the folder")
    # "training" alone could be a split, and the others are none.
    with pytest.raises(
        DataError, match=r"splits train \(1 file\), and 3 files such as .* --dataset-split all"
    ):
        read(tmp_path)
    assert read(tmp_path, split="all") == (["text"], [f"{name}\nline 2\n" for name in names])
    (tmp_path / "training.md").unlink()
    assert read(tmp_path)[1] == [f"{name}\nline 2\n" for name in names[:3]]
    with pytest.raises(DataError, match="splits test"):
        read(tmp_path, "line")
    assert read(tmp_path, "line", split="all")[1][:2] == ["b/README.md", "line 2"]


def test_texts_that_all_name_a_split_are_split(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write(tmp_path / f"wiki.{split}.raw", split)
    assert read(tmp_path, "text")[1] == ["train"] and read(tmp_path, "text", split="validation")[
        1
    ] == ["valid"]
    for split in ("train", "valid"):
        (tmp_path / f"wiki.{split}.raw").unlink()
    assert read(tmp_path, "text")[1] == ["test"]


def test_files_with_tabs_are_csv_by_name_too(tmp_path: Path) -> None:
    write(tmp_path / "a/x.tsv", "n\ttext\n1\ttab\n")
    assert read(tmp_path / "a", "csv")[1] == ["tab"] == read(tmp_path / "a/x.tsv", "csv")[1]
    write(tmp_path / "b/x.tsv", "n\ttext\n1\ttab\n")
    write(tmp_path / "b/x.csv", "n,text\n1,comma\n")
    assert read(tmp_path / "b", "csv")[1] == ["comma"]


def test_names_in_capitals_are_of_the_same_kind_alone_and_in_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "a/PART.JSONL.GZ"
    write(path, gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    for given in (path, tmp_path / "a", tmp_path / "a/*"):
        assert read(given)[1] == ["one", "two"]


def test_files_that_a_card_names_for_two_splits_are_said(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", name)
    splits = "  - split: train\n    path: '*.jsonl'\n  - split: test\n    path: b.jsonl\n"
    write(tmp_path / "README.md", f"---\nconfigs:\n- config_name: a\n  data_files:\n{splits}---\n")
    assert read(tmp_path)[1] == ["a", "b"]
    assert "README.md names 1 for the split test too" in said.text


def test_code_that_git_ignores_and_data_behind_links_are_seen_as_they_are(tmp_path: Path) -> None:
    write_rows(tmp_path / "outside/x.jsonl", "row")
    write(tmp_path / "in/src/a.py", "code")
    (tmp_path / "in/data").symlink_to("../outside")
    with pytest.raises(ConfigError, match="1 of JSON lines, 1 of source code"):
        read(tmp_path / "in")
    write(tmp_path / "in/.gitignore", "src/\n")
    assert read(tmp_path / "in") == (["jsonl"], ["row"])


def test_texts_without_an_ending_need_a_format(tmp_path: Path) -> None:
    write(tmp_path / "AA/wiki_00", "one\n")
    write(tmp_path / "AB/wiki_00", "two\n")
    with pytest.raises(
        ConfigError,
        match="2 files of no known kind, such as AA/wiki_00: say what they are with --format text",
    ):
        read(tmp_path)
    assert read(tmp_path, "text")[1] == ["one\n", "two\n"] == read(tmp_path, "source_code")[1]


def test_source_code_stays_source_code(tmp_path: Path) -> None:
    for name in (
        "main.js",
        "package.json",
        "tsconfig.json",
        "docs/guide.md",
        "a/b.py",
        "requirements.txt",
        "venv/x.csv",
        "data/y.jsonl",
    ):
        write(tmp_path / name, name)
    with pytest.raises(ConfigError, match="1 of JSON lines, 1 of CSV, 2 of source code"):
        read(tmp_path)
    write(tmp_path / ".gitignore", "venv/\ndata/\n")
    kinds, found = read(tmp_path)
    assert kinds == ["source_code"] and {
        "main.js",
        "package.json",
        "docs/guide.md",
        "a/b.py",
    } <= set(found)


def test_the_scripts_of_a_data_set_do_not_make_it_source_code(tmp_path: Path) -> None:
    write_rows(tmp_path / "data/train.parquet", "row")
    write(tmp_path / "loader.py", "code")
    assert read(tmp_path)[1] == ["row"]
    write(tmp_path / "src/more.py", "code")
    with pytest.raises(ConfigError, match="2 of source code"):
        read(tmp_path)


@pytest.mark.parametrize(
    "kind", [None, "text", "line", "jsonl", "parquet", "arrow", "csv", "source_code", "datasets"]
)
def test_folders_without_anything_to_read_are_refused(tmp_path: Path, kind: str | None) -> None:
    write(tmp_path / "hidden/.gitattributes", "x")
    write(tmp_path / "hidden/.git/config", "x")
    write(tmp_path / "side/README.md", "x")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "hidden", "side")[: 1 if kind in ("source_code", "datasets") else 3]:
        with pytest.raises(PipelineError, match=f"{name}.* (holds no|cannot be read)") as refusal:
            read(tmp_path / name, kind)
        assert refusal.value.exit_code in (2, 3) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["train.parquet", "a.jsonl", "a.csv", "a.txt", "a.arrow", "a.jsonl.zst"]
)
def test_git_lfs_pointers_are_refused_in_folders_and_patterns(tmp_path: Path, name: str) -> None:
    write(tmp_path / "data" / name, POINTER)
    for given in (tmp_path, tmp_path / "data" / f"*{name[-3:]}"):
        with pytest.raises(DataError, match=r"is a Git LFS pointer, .* 'git lfs pull'"):
            read(given)
    with pytest.raises(DataError, match="is a Git LFS pointer"):
        read(tmp_path, "datasets")


def test_pointers_among_source_code_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.py", "code")
    write(tmp_path / "logo.png", POINTER)
    results = read_all({"kind": "source_code", "input": [str(tmp_path)]})
    assert texts(results) == ["code"] and reasons(results) == ["git_lfs_pointer"]


def test_the_hubs_cache_is_read_through_its_links(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "hub/datasets--org--name"
    for revision, row in (("aaa", "old"), ("bbb", "new")):
        write_rows(cache / f"blobs/{row}.parquet", row)
        snapshot = cache / f"snapshots/{revision}/data"
        snapshot.mkdir(parents=True)
        (snapshot / "train-00000-of-00002.parquet").symlink_to(f"../../../blobs/{row}.parquet")
    with pytest.raises(DataError, match="has the snapshots aaa, bbb and none of them is 'main'"):
        read(cache)
    write(cache / "refs/main", "bbb")
    write(cache / "blobs/123.incomplete", "")
    assert read(cache)[1] == ["new"] and read(cache / "snapshots/aaa")[1] == ["old"]
    assert (
        "a download that did not end" in said.text
        and "only 1 of the 2 shards data/train-*-of-00002.parquet" in said.text
    )
    with pytest.raises(
        DataError,
        match=(
            "cache of several data sets of the hub: give the folder of one, such as"
            " .*datasets--org--name"
        ),
    ):
        read(tmp_path / "hub")
    (cache / "blobs/new.parquet").unlink()
    for given in (cache, cache / "snapshots/bbb/data/*.parquet"):
        with pytest.raises(DataError, match="is a link to a file that is not there"):
            read(given)


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    write_rows(tmp_path / "outside/x.jsonl", "one")
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / name).symlink_to("../outside")
    (tmp_path / "in/loop").symlink_to(".")
    assert read(tmp_path / "in")[1] == ["one"]


def test_partitioned_tables_are_read_whole_and_a_split_among_their_keys_counts(
    tmp_path: Path,
) -> None:
    for language in ("de", "en"):
        write_rows(tmp_path / f"lang={language}/part-0.parquet", language)
    write(tmp_path / "_SUCCESS", "")
    write(tmp_path / "lang=de/.part-0.parquet.crc", "")
    assert read(tmp_path)[1] == ["de", "en"]
    for split in ("train", "test"):
        write_rows(tmp_path / f"s/split={split}/part-0.parquet", split)
    assert read(tmp_path / "s")[1] == ["train"]
    write(tmp_path / "s/_delta_log/0.json", "{}")
    with pytest.raises(DataError, match="Delta Lake table"):
        read(tmp_path / "s")


def test_a_split_is_chosen_and_the_rest_is_said_or_the_folder_is_refused(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    for name in ("train", "validation", "test"):
        write_rows(tmp_path / f"{name}.jsonl", name)
    assert read(tmp_path)[1] == ["train"]
    assert "not read: 1 of split test, 1 of split validation" in said.text
    assert read(tmp_path, split="test")[1] == ["test"] and read(tmp_path, split="all")[1] == [
        "test",
        "train",
        "validation",
    ]
    with pytest.raises(DataError, match=r"no split 'dev' \(it has test \(1 file\), train"):
        read(tmp_path, split="dev")
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(
        DataError, match="no split 'train' .* choose one with --dataset-split, or take all"
    ):
        read(tmp_path)
    write_rows(tmp_path / "plain/a.jsonl", "a")
    with pytest.raises(DataError, match="no name in it says a split"):
        read(tmp_path / "plain", split="test")
    with pytest.raises(DataError, match="declares no configs"):
        read(tmp_path / "plain", config="en")
    for given in (str(tmp_path / "plain/a.jsonl"), "-"):
        with pytest.raises(ConfigError, match="no input is one"):
            sources_of([given], None, split="test")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("configs: [", "the YAML at the start of .*README.md cannot be read"),
        ("configs: 3", "not as the hub has them"),
        ("configs:\n- config_name: a\n  data_files: ../../*.jsonl", "not as the hub has them"),
        ("configs:\n- config_name: a\n  data_files: /etc/*", "not as the hub has them"),
        ("configs:\n- config_name: a\n  data_files: https://a/b.jsonl", "not as the hub has them"),
        ("configs:\n- data_files: a.jsonl", "not as the hub has them"),
        ("configs:\n- config_name: a\n  data_files: [[x]]", "not as the hub has them"),
        (
            "configs:\n- config_name: a\n  data_files: gone/*",
            "names the files gone/\\*, which are not there",
        ),
        (
            "a: &a [x, x]\nb: &b [*a, *a]\nconfigs:\n- config_name: *b\n  data_files: x",
            "not as the hub has them",
        ),
    ],
)
def test_declarations_that_cannot_be_followed_are_refused(
    tmp_path: Path, card: str, message: str
) -> None:
    write_rows(tmp_path / "a.jsonl", "a")
    write(tmp_path / "README.md", f"---\n{card}\n---\n")
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_a_config_by_folder_takes_its_splits_from_the_names_in_it(tmp_path: Path) -> None:
    for name in ("test_set/train.jsonl", "test_set/dev.jsonl", "other/x.jsonl"):
        write_rows(tmp_path / name, name)
    write(
        tmp_path / "README.md",
        "---\nconfigs:\n- config_name: a\n  data_dir: test_set\n- config_name: b\n  data_dir:"
        " other\n  default: true\n---\n",
    )
    assert read(tmp_path)[1] == ["other/x.jsonl"]
    assert read(tmp_path, config="a")[1] == ["test_set/train.jsonl"]
    assert read(tmp_path, config="a", split="validation")[1] == ["test_set/dev.jsonl"]


def test_no_random_folder_is_read_in_part_without_a_word(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    """Any names in any folder: each file of data is read, or named in what is said, or the folder
    is refused.
    """
    source = random.Random(2)
    names = [
        "README.md",
        "LICENSE",
        "a.jsonl",
        "b.jsonl",
        "train.jsonl",
        "test.jsonl",
        "x.parquet",
        "y.csv",
        "z.txt",
        "main.py",
        "p.png",
        "q.json",
    ]
    outcomes = {"whole": 0, "said": 0, "refused": 0}
    for number in range(300):
        root = tmp_path / str(number)
        chosen = {
            f"{source.choice(['', '', 'data/', 'train/', 'dev/', 'src/'])}{name}"
            for name in source.sample(names, source.randint(1, 4))
        }
        for name in chosen:
            write_rows(root / name, f"row of {name}")
        kind = source.choice([None, None, "jsonl", "text", "csv", "parquet", "source_code"])
        try:
            (read_as,), found = read(root, kind)
        except PipelineError as error:
            assert error.exit_code in (2, 3) and str(root) in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        unread = [name for name in chosen if not any(f"row of {name}" in text for text in found)]
        sentences = [
            record.getMessage()
            for record in said.records
            if record.getMessage().startswith(f"{root}:")
        ]
        parts = [
            part
            for sentence in sentences
            for part in sentence.partition("not read: ")[2].rpartition(", such")[0].split(", ")
        ]
        counted = sum(int(part.split()[0]) for part in parts if part)
        # Of source code every file is read, a Parquet file as one that is binary, which is counted
        # then.
        assert counted == len(unread) or read_as == "source_code", (chosen, kind, found, sentences)
        assert read_as != "source_code" or all(name.endswith(".parquet") for name in unread), (
            chosen,
            unread,
        )
        outcomes["said" if unread else "whole"] += 1
        said.clear()
    assert min(outcomes.values()) > 30, outcomes


def test_names_of_the_hub_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sources_of(["org/name", "other/one"], "datasets", "en", "train") == {
        "datasets": {
            "kind": "datasets",
            "dataset": "org/name",
            "config": "en",
            "dataset_split": "train",
        },
        "datasets_2": {
            "kind": "datasets",
            "dataset": "other/one",
            "config": "en",
            "dataset_split": "train",
        },
    }
    with pytest.raises(DataError, match="matches no file .* add --format datasets"):
        sources_of(["org/name"], None)


def test_a_recipes_section_takes_folders_as_the_command_does(tmp_path: Path) -> None:
    write_rows(tmp_path / "a/train.jsonl", "one")
    write_rows(tmp_path / "a/test.jsonl", "held out")
    write_rows(tmp_path / "b.jsonl", "two")
    section = {"kind": "jsonl", "input": [str(tmp_path / "a"), str(tmp_path / "*.jsonl")]}
    assert texts(read_all(section)) == ["one", "two"]
    assert texts(read_all(section | {"dataset_split": "test"})) == ["held out", "two"]


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read everything: as another user inside, if the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_cannot_be_listed_is_one_sentence() -> None:
    # pytest's own folders are closed to other users.
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_rows(folder / "a/open/x.jsonl", "one")
        # The imports of reading are done before the user changes, who may not reach them.
        assert read(folder / "a") == (["jsonl"], ["one"])
        write_rows(folder / "a/locked/x.jsonl", "one")
        (folder / "a/locked").chmod(0)
        with without_privileges(), pytest.raises(DataError, match="cannot be read .*Permission"):
            read(folder / "a")
        (folder / "a/locked").chmod(0o700)
