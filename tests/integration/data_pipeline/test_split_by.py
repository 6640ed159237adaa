"""What decides the side of a document, over whole builds: its text as it is stored, the path of its
file, or its id.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.preprocess.coordinator import BuildResult, build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.split import SPLITS, position, text_digest
from data_pipeline.sources import files
from pretrain.core.errors import ConfigError, DataError
from tests.support.fork_server import run_python
from tests.support.paths import TOOLS
from tests.unit.data_pipeline.preprocess.test_build import contents, jsonl, texts

SHARE = 0.3
NUMBERS = range(35)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with 35 files in raw/."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in NUMBERS:
        (folder / f"{number:02}.txt").write_text(f"text {number} " + "word " * (number % 7))
    monkeypatch.chdir(tmp_path)
    files._warn_once.cache_clear()
    return tmp_path


def config_of(source: dict[str, Any] | str, **settings: Any) -> DataConfig:
    """The data section of a source, or of a pattern of text files."""
    given = {"kind": "text", "input": [source]} if isinstance(source, str) else source
    base = {
        "source": given,
        "tokenizer": {"kind": "train_bpe", "vocab_size": 280},
        "validation_share": SHARE,
    }
    return DataConfig.model_validate(base | settings)


def build_in(folder: str, config: DataConfig) -> BuildResult:
    return build(config, Output(Path(folder)), workers=1)


def sides(result: BuildResult) -> dict[str, list[str]]:
    return {split: texts(result.manifest, split) for split in SPLITS}


def shards(folder: str) -> dict[str, bytes]:
    return {
        name: content
        for name, content in contents(Path(folder)).items()
        if name.endswith((".bin", ".idx", "tokenizer.json"))
    }


@pytest.mark.parametrize("by", ["content", "path"])
def test_a_corpus_splits_the_same_however_it_is_named(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    spellings = [
        "raw/*.txt",
        f"{corpus}/raw/*.txt",
        "./raw/../raw/*.txt",
        "linked/*.txt",
        "raw/**/*.txt",
        "raw/[0-9]*.txt",
    ]
    os.symlink("raw", "linked")
    for number, spelling in enumerate(spellings):
        build_in(f"data{number}", config_of(spelling, split_by=by))
    (corpus / "elsewhere").mkdir()
    monkeypatch.chdir(corpus / "elsewhere")
    build_in("../moved", config_of("../raw/*.txt", split_by=by))
    monkeypatch.chdir(corpus)
    expected = shards("data0")
    assert (
        len(expected) == 5
        and all(shards(f"data{number}") == expected for number in range(len(spellings)))
        and shards("moved") == expected
    )


def test_the_text_decides(corpus: Path) -> None:
    found = sides(build_in("data", config_of("raw/*.txt")))
    for split, stored in found.items():
        assert stored and all(
            (position(text_digest(text)) < SHARE) == (split == "validation") for text in stored
        )


def test_texts_that_cleaning_makes_equal_are_on_one_side(corpus: Path) -> None:
    variants = (
        [f"caf\u00e9 {n} owner{n}@mail.org" for n in NUMBERS],
        [f"cafe\u0301 {n} other{n}@mail.com" for n in NUMBERS],
    )
    path = jsonl(
        corpus / "a.jsonl", [text for pair in zip(*variants, strict=True) for text in pair]
    )
    cleaning = {"normalize": {}, "redact": {}}
    found = sides(
        build_in("data", config_of({"kind": "jsonl", "input": [str(path)]}, cleaning=cleaning))
    )
    assert all(len(set(found[split])) * 2 == len(found[split]) > 0 for split in SPLITS) and not set(
        found["train"]
    ) & set(found["validation"])
    raw = sides(build_in("raw_data", config_of({"kind": "jsonl", "input": [str(path)]})))
    number_of = {split: {text.split()[1] for text in raw[split]} for split in SPLITS}
    assert number_of["train"] & number_of["validation"], (
        "without cleaning the variants are different texts"
    )


@pytest.mark.parametrize("share", [0.3, 0.01, 0.99])
def test_equal_texts_are_never_on_both_sides(corpus: Path, share: float) -> None:
    path = jsonl(corpus / "a.jsonl", [f"text {number % 5} of five" for number in range(60)])
    found = sides(
        build_in("data", config_of({"kind": "jsonl", "input": [str(path)]}, validation_share=share))
    )
    assert all(found[split] for split in SPLITS) and not set(found["train"]) & set(
        found["validation"]
    )
    assert Counter(found["train"] + found["validation"]) == {
        f"text {number} of five": 12 for number in range(5)
    }


@pytest.mark.parametrize("cleaning", [{}, {"exact_duplicates": True}])
def test_of_a_single_text_the_end_is_held_out_however_often_it_comes(
    corpus: Path, cleaning: dict[str, Any]
) -> None:
    lines = [f"line {number}\n" for number in range(40)]
    path = jsonl(corpus / "a.jsonl", ["".join(lines)] * 3)
    found = sides(
        build_in("data", config_of({"kind": "jsonl", "input": [str(path)]}, cleaning=cleaning))
    )
    copies = 1 if cleaning else 3
    assert len(found["train"]) == len(found["validation"]) == copies
    assert found["train"][0] + found["validation"][0] == "".join(lines)


def test_adding_documents_moves_none(corpus: Path) -> None:
    before = sides(build_in("before", config_of("raw/*.txt")))
    (corpus / "raw" / "000.txt").write_text("a new first text")
    (corpus / "raw" / "deep").mkdir()
    (corpus / "raw" / "deep" / "z.txt").write_text("a new last text")
    after = sides(build_in("after", config_of("raw/**/*.txt")))
    assert all(
        set(before[split]) < set(after[split]) or before[split] == after[split] for split in SPLITS
    )
    assert sum(map(len, after.values())) == sum(map(len, before.values())) + 2


def test_fill_in_the_middle_and_near_duplicates_do_not_change_the_sides(corpus: Path) -> None:
    whole = sides(build_in("whole", config_of("raw/*.txt")))
    near = sides(
        build_in("near", config_of("raw/*.txt", cleaning={"near_duplicates": {"threshold": 0.9}}))
    )
    assert all(set(near[split]) <= set(whole[split]) for split in SPLITS)
    middle = {"rate": 1.0}
    tokenizer = {
        "kind": "train_bpe",
        "vocab_size": 290,
        "reserved_tokens": ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"],
    }
    filled = build_in(
        "filled", config_of("raw/*.txt", tokenizer=tokenizer, fill_in_the_middle=middle)
    )
    assert texts(filled.manifest, "validation") == whole["validation"]


def test_by_path_the_records_of_a_file_are_on_one_side_wherever_the_corpus_is(corpus: Path) -> None:
    for folder in ("one", "two"):
        for number in range(12):
            (corpus / folder).mkdir(exist_ok=True)
            jsonl(
                corpus / folder / f"{number}.jsonl",
                [f"file {number} record {record}" for record in range(6)],
            )
    found = {}
    for folder in ("one", "two"):
        config = config_of(
            {"kind": "jsonl", "input": [f"{folder}/*.jsonl"]}, split_by="path", split_root=folder
        )
        found[folder] = sides(build_in(f"data_{folder}", config))
    assert found["one"] == found["two"]
    files_of = {
        split: {text.split()[1] for text in stored} for split, stored in found["one"].items()
    }
    assert all(files_of.values()) and not files_of["train"] & files_of["validation"]
    assert files_of["validation"] == {
        str(n) for n in range(12) if position(0, f"{n}.jsonl") < SHARE
    }
    with pytest.raises(DataError, match=r"one/0.jsonl is outside data.split_root .*/two"):
        build_in(
            "data_three",
            config_of(
                {"kind": "jsonl", "input": ["one/*.jsonl"]}, split_by="path", split_root="two"
            ),
        )
    (corpus / "two" / "link.jsonl").symlink_to("../one/0.jsonl")
    with pytest.raises(
        DataError,
        match=r"two/link.jsonl, a link to .*/one/0.jsonl, is outside data.split_root .*/two",
    ):
        build_in(
            "data_four",
            config_of(
                {"kind": "jsonl", "input": ["two/*.jsonl"]}, split_by="path", split_root="two"
            ),
        )


def test_by_id_the_id_decides_and_a_changed_text_stays(corpus: Path) -> None:
    source = {"kind": "jsonl", "input": ["a.jsonl"], "id_field": "url"}
    jsonl(corpus / "a.jsonl", [{"text": f"text {n}", "url": f"u{n}"} for n in NUMBERS])
    before = sides(build_in("before", config_of(source, split_by="id")))
    assert set(before["validation"]) == {
        f"text {n}" for n in NUMBERS if position(0, f"u{n}") < SHARE
    }
    jsonl(corpus / "a.jsonl", [{"text": f"text {n} again", "url": f"u{n}"} for n in NUMBERS])
    after = sides(build_in("after", config_of(source, split_by="id")))
    assert [f"{text} again" for text in before["validation"]] == after["validation"]
    by_text = sides(build_in("by_text", config_of(source)))
    assert set(by_text["validation"]) == {
        f"text {n} again" for n in NUMBERS if position(text_digest(f"text {n} again")) < SHARE
    }


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        ("raw/*.txt", {"split_by": "id"}, "split_by is id, and the source 'all' has no id_field"),
        (
            {"kind": "stdin"},
            {"split_by": "path"},
            "split_by is path, and the source 'all' has no files",
        ),
        ({"kind": "datasets", "preset": "wikitext_103_raw"}, {"split_by": "id"}, "has no id_field"),
    ],
)
def test_what_a_source_cannot_be_split_by_is_refused(
    corpus: Path, source: Any, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        build_in("data", config_of(source, **settings))
    assert not Path("data").exists()


def test_by_one_path_nothing_can_be_held_out_and_that_is_said(corpus: Path) -> None:
    jsonl(corpus / "a.jsonl", ["one", "two", "three"])
    with pytest.raises(DataError, match="all 3 documents have one path.*split by content"):
        build_in("data", config_of({"kind": "jsonl", "input": ["a.jsonl"]}, split_by="path"))
    fixed = {"kind": "jsonl", "input": ["a.jsonl"], "split": "train"}
    built = build_in("fixed", config_of(fixed, split_by="id"))
    assert texts(built.manifest, "train") == ["one", "two", "three"], (
        "a source of one side needs no ids"
    )


def test_a_file_of_many_names_is_read_once_and_that_is_said(
    corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.symlink("raw", "linked")
    os.symlink("raw/03.txt", "soft.txt")
    os.link("raw/04.txt", "hard.txt")
    once = build_in("once", config_of("raw/*.txt"))
    assert not [
        record
        for record in caplog.records
        if record.levelno >= logging.WARNING and "read once" in record.message
    ]
    names = [
        "raw/*.txt",
        "./raw/00.txt",
        f"{corpus}/raw/01.txt",
        "raw/../raw/02.txt",
        "linked/0*.txt",
        "soft.txt",
        "hard.txt",
    ]
    many = build_in("many", config_of({"kind": "text", "input": names}))
    assert sides(many) == sides(once) and shards("many") == shards("once")
    [said] = {record.message for record in caplog.records if "read once" in record.message}
    assert said.startswith(
        "the input has 15 more names of files that are named already (raw/00.txt is named twice)"
    )


def test_overlapping_folders_of_source_code_are_read_once(corpus: Path) -> None:
    os.link("raw/00.txt", "raw/again.txt")
    found = sides(
        build_in(
            "data",
            config_of({"kind": "source_code", "input": ["raw", f"{corpus}/raw", "./raw/00.txt"]}),
        )
    )
    assert sum(map(len, found.values())) == len(NUMBERS)


def test_a_file_in_two_sources_is_refused_under_whatever_names(corpus: Path) -> None:
    os.symlink("raw/07.txt", "other.txt")
    for second in ("other.txt", f"{corpus}/raw/07.txt"):
        sources = {
            "a": {"kind": "text", "input": ["raw/*.txt"]},
            "b": {"kind": "text", "input": [second], "split": "validation"},
        }
        config = DataConfig.model_validate(
            {"sources": sources, "tokenizer": {"kind": "train_bpe", "vocab_size": 280}}
        )
        with pytest.raises(
            ConfigError, match=r"07.txt.* is in two sources, 'a' and 'b': name it in one of them"
        ):
            build_in("data", config)


def test_the_command_splits_by_what_it_is_told(corpus: Path) -> None:
    jsonl(corpus / "a.jsonl", [{"text": f"text {n}", "url": f"u{n}"} for n in NUMBERS])
    command = (TOOLS / "preprocess_data.py", "--input", "a.jsonl", "a.jsonl", "--vocab-size", "280")
    options = [
        "--output",
        "data",
        "--validation-share",
        str(SHARE),
        "--split-by",
        "id",
        "--id-field",
        "url",
        "--json",
        "-",
    ]
    done = run_python(*command, *options)
    assert done.returncode == 0, done.stderr
    held_out = sum(position(0, f"u{n}") < SHARE for n in NUMBERS)
    assert (
        json.loads(done.stdout)["splits"]["validation"]["documents"] == held_out
        and "each file is read once" in done.stderr
    )
    refused = run_python(*command, "--output", "other", "--split-by", "id")
    assert refused.returncode == 2 and "has no id_field" in refused.stderr
