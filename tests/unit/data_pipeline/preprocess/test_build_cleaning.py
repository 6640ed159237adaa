"""Cleaning, duplicates and filling in the middle inside a build: what stays, what is counted, and
that workers change nothing.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.preprocess.coordinator import BuildResult, build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.indexed import IndexedReader
from data_pipeline.shards.manifest import verify
from data_pipeline.tokenizer.tokenizer import load_tokenizer
from pretrain.core.errors import DataError

UNIQUE = [
    " ".join(f"word{chosen}" for chosen in random.Random(number).choices(range(1000), k=80))
    for number in range(60)
]


def section(path: Path, **settings: Any) -> DataConfig:
    base = {
        "source": {"kind": "jsonl", "input": [str(path)]},
        "tokenizer": {"kind": "train_bpe", "vocab_size": 300},
        "unit_bytes": 2000,
    }
    return DataConfig.model_validate(base | {"validation_share": 0.0} | settings)


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def sequences(result: BuildResult, split: str = "train") -> list[list[int]]:
    return [
        reader[index].tolist()
        for shard in result.manifest.splits[split].shards
        for reader in [IndexedReader(result.folder / shard.prefix)]
        for index in range(len(reader))
    ]


def texts(result: BuildResult, split: str = "train") -> list[str]:
    tokenizer = load_tokenizer(result.manifest.tokenizer_path)
    return [tokenizer.decode(tokens[:-1]) for tokens in sequences(result, split)]


def test_of_equal_texts_the_first_stays_and_the_others_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*UNIQUE, UNIQUE[5], *UNIQUE[40:45], UNIQUE[5]])
    results = [
        build(
            section(path, cleaning={"exact_duplicates": True}),
            Output(tmp_path / f"data{workers}"),
            workers=workers,
        )
        for workers in (1, 2)
    ]
    assert texts(results[0]) == UNIQUE
    source, split = results[0].manifest.sources["all"], results[0].manifest.splits["train"]
    assert (source.records, source.documents, source.dropped) == (67, 60, {"exact_duplicate": 7})
    assert (split.documents, split.utf8_bytes, source.utf8_bytes) == (
        60,
        *[sum(len(text) for text in UNIQUE)] * 2,
    )
    assert split.tokens == sum(map(len, sequences(results[0])))
    verify(results[0].manifest, deep=True)
    rows = [
        json.loads(row)
        for row in (results[0].folder / "dropped_documents.jsonl").read_text().splitlines()
    ]
    content = path.read_bytes()
    dropped = [
        json.loads(content[int(row["document"].rsplit(":", 1)[1]) :].splitlines()[0])["text"]
        for row in rows
    ]
    assert dropped == [UNIQUE[5], *UNIQUE[40:45], UNIQUE[5]]
    for name in ("train.bin", "train.idx", "manifest.json", "dropped_documents.jsonl"):
        assert (results[0].folder / name).read_bytes() == (results[1].folder / name).read_bytes()
    assert len(texts(build(section(path), Output(tmp_path / "without")))) == 67


def test_of_near_duplicates_the_first_stays(tmp_path: Path) -> None:
    typo = UNIQUE[3].replace("word", "wrod", 1)
    path = jsonl(tmp_path / "a.jsonl", [*UNIQUE[:30], typo, *UNIQUE[30:]])
    result = build(section(path, cleaning={"near_duplicates": {}}), Output(tmp_path / "data"))
    assert texts(result) == UNIQUE
    assert result.manifest.sources["all"].dropped == {"near_duplicate": 1}


def test_every_record_is_kept_or_counted_with_its_reason(tmp_path: Path) -> None:
    english = " ".join(["the cat and the dog have been with that man of the house to be"] * 5)
    records = [
        english,
        english.replace("cat", "cow"),
        "too short",
        "write to someone@gmail.com " + english,
        english,
        "αβγ δεζ " * 60,
    ]
    path = jsonl(tmp_path / "a.jsonl", records)
    with path.open("a") as stream:
        stream.write("{\n" + json.dumps({"text": ""}) + "\n")
    cleaning = {"gopher_quality": {}, "redact": {}, "exact_duplicates": True, "normalize": {}}
    source = build(section(path, cleaning=cleaning), Output(tmp_path / "data")).manifest.sources[
        "all"
    ]
    assert (
        source.records
        == 8
        == source.documents
        + sum(source.bad.values())
        + sum(source.left_out.values())
        + sum(source.dropped.values())
    )
    assert source.bad == {"empty": 1, "invalid_json": 1}
    assert source.dropped["exact_duplicate"] == 1 and source.dropped["gopher_min_words"] == 1
    assert any("email" in name for name in source.edits)
    reasons = {
        json.loads(row)["reason"]
        for row in (tmp_path / "data" / "dropped_documents.jsonl").read_text().splitlines()
    }
    assert reasons == set(source.dropped)


def test_a_cleaned_corpus_is_cut_between_splits_by_its_clean_texts(tmp_path: Path) -> None:
    raw = build(
        section(
            jsonl(tmp_path / "a.jsonl", [text + "\n" for text in UNIQUE]), validation_share=0.3
        ),
        Output(tmp_path / "raw"),
    )
    path = jsonl(tmp_path / "b.jsonl", [text + "\r\n" for text in UNIQUE])
    clean = build(
        section(path, validation_share=0.3, cleaning={"normalize": {}}), Output(tmp_path / "clean")
    )
    for split in ("train", "validation"):
        assert texts(raw, split) == texts(clean, split) != []


SENTINELS = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]


def test_training_documents_are_cut_for_filling_in_the_middle_and_validation_is_not(
    tmp_path: Path,
) -> None:
    path = jsonl(tmp_path / "a.jsonl", UNIQUE)
    tokenizer = {"kind": "train_bpe", "vocab_size": 320, "reserved_tokens": SENTINELS}
    settings = {
        "tokenizer": tokenizer,
        "validation_share": 0.3,
        "fill_in_the_middle": {"rate": 0.6, "spm_rate": 0.0},
    }
    result = build(section(path, **settings), Output(tmp_path / "data"))
    library = load_tokenizer(result.manifest.tokenizer_path)
    prefix, middle, suffix = (library.token_id(token) for token in SENTINELS)
    found = sequences(result)
    moved = [tokens for tokens in found if prefix in tokens]
    assert 0.3 < len(moved) / len(found) < 0.9
    restored = []
    for tokens in found:
        if prefix in tokens:
            assert [tokens.count(sentinel) for sentinel in (prefix, middle, suffix)] == [
                1,
                1,
                1,
            ] and tokens[0] == prefix
            at = [tokens.index(sentinel) for sentinel in (suffix, middle)]
            parts = tokens[1 : at[0]], tokens[at[1] + 1 : -1], tokens[at[0] + 1 : at[1]]
            restored.append("".join(library.decode(part) for part in parts))
        else:
            restored.append(library.decode(tokens[:-1]))
    assert set(restored) | set(texts(result, "validation")) == set(UNIQUE)
    plain = {"kind": "train_bpe", "vocab_size": 320}
    with pytest.raises(DataError, match="reserved_tokens"):
        build(section(path, **settings | {"tokenizer": plain}), Output(tmp_path / "without"))
