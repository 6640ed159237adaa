"""Rows of a data set: so many of them, each a document or joined, and the data set's own splits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data_pipeline.config import DataConfig
from tests.integration.data_pipeline.test_source_datasets import (
    WIKITEXT,
    read,
    write_parquet,
)
from tests.support.fork_server import run_python
from tests.support.paths import TOOLS

TOOL = TOOLS / "preprocess_data.py"
ROWS = {"dataset": "wiki", "group": "rows"}
JOINED = {"dataset": "wiki", "group": "wikitext_articles"}
PARAGRAPHS = [row for row in WIKITEXT if row.strip()]


@pytest.fixture
def wiki(tmp_path: Path) -> dict[str, Any]:
    for split, rows in {
        "train": WIKITEXT * 40,
        "validation": [f" v {number} \n" for number in range(7)],
        "test": [f" t {number} \n" for number in range(5)],
    }.items():
        write_parquet(tmp_path / f"wiki/{split}.parquet", {"text": rows})
    return {"dataset": str(tmp_path / "wiki")}


def texts(outcome: dict[str, Any]) -> list[str]:
    return [result[0] for result in outcome["results"] if len(result) == 5]


def test_samples_are_rows_before_they_are_joined_or_left_out(
    tmp_path: Path, wiki: dict[str, Any]
) -> None:
    """Of the first nine rows, five are blank; they hold one whole article."""
    joined, rows = wiki | {"group": "wikitext_articles"}, wiki | {"group": "rows"}
    nine = {"max_samples": 9}
    asked = [
        (joined | nine, 1, {}),
        (joined | {"max_samples": 10}, 1, {}),
        (joined | {"max_samples": 10, "max_documents": 1}, 1, {}),
        (rows | nine, 1, {}),
        (rows, 1, {}),
        (rows | {"max_samples": 10**9}, 1 << 20, {}),
        (wiki | {"preset": "wikitext_103_raw", "config": None} | rows | nine, 1, {}),
        (rows | nine | {"streaming": True}, 1, {}),
    ]
    first, ten, limited, few, all_rows, beyond, preset, stream = read(tmp_path, *asked)
    assert texts(first) == ["".join(f"{row.removesuffix(chr(10))}\n" for row in WIKITEXT[1:9])]
    assert first["units"][-1][1] == 9 and ten["units"][-1][1] == 10
    assert texts(ten) == [*texts(first), " = E = mc² = \n"] and texts(limited) == texts(first)
    assert texts(few) == texts(preset) == [row for row in WIKITEXT[:9] if row.strip()]
    blank = [result for result in few["results"] if len(result) != 5]
    assert {(result[1], result[5]) for result in blank} == {("blank_row", False)}
    assert len(blank) == 5
    assert texts(all_rows) == texts(beyond) == PARAGRAPHS * 40
    assert "max_samples counts rows of a table, which a stream is not" in stream["error"]


def build(folder: Path, wiki: dict[str, Any], name: str, *options: str) -> dict[str, Any]:
    arguments = ["--recipe", "h64lm", "--set", f"data.source.dataset={wiki['dataset']}"]
    arguments += ["--set", "data.tokenizer={kind: train_bpe, vocab_size: 300}"]
    done = run_python(
        *(TOOL, *arguments, *options, "--output", name, "--workers", "1", "--json", "-"),
        cwd=folder,
        env=dict(os.environ) | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    manifest: dict[str, Any] = json.loads((folder / name / "manifest.json").read_text())
    return manifest


def documents(manifest: dict[str, Any]) -> tuple[int, int]:
    splits = manifest["splits"]
    return splits["train"]["documents"], splits["validation"]["documents"]


def test_the_tool_builds_so_many_rows_with_so_many_held_out(
    tmp_path: Path, wiki: dict[str, Any]
) -> None:
    rows = ("--set", "data.source.group=rows", "--set", "data.cleaning.exact_duplicates=true")
    manifest = build(tmp_path, wiki, "a", *rows, "--max-samples", "14", "--validation-documents=3")
    # Of the first 14 rows six are blank, and the eight others differ.
    assert documents(manifest) == (5, 3) and manifest["sources"]["all"]["records"] == 14
    assert manifest["sources"]["all"]["left_out"] == {"blank_row": 6}


def test_the_data_sets_own_split_is_held_out_whole(tmp_path: Path, wiki: dict[str, Any]) -> None:
    rows = ("--set", "data.source.group=rows", "--max-samples", "9")
    manifest = build(tmp_path, wiki, "a", *rows, "--set", "data.source.validation_split=test")
    assert documents(manifest) == (4, 5)
    assert list(manifest["sources"]) == ["all", "all_validation"]
    assert manifest["sources"]["all_validation"]["documents"] == 5


def test_one_section_with_a_split_of_its_own_is_two_sources() -> None:
    section = {"kind": "datasets", "preset": "wikitext_103_raw", "max_samples": 100}
    data = DataConfig.model_validate({"source": section | {"validation_split": "test"}})
    same = {
        "all": section | {"split": "train"},
        "all_validation": {
            "kind": "datasets",
            "preset": "wikitext_103_raw",
            "dataset_split": "test",
            "split": "validation",
        },
    }
    assert data == DataConfig.model_validate({"sources": same})
    # A saved recipe has the two, and reads back as itself.
    assert DataConfig.model_validate(data.model_dump(mode="json")) == data
    for wrong, sentence in (
        ({"source": section | {"validation_split": "test", "split": "train"}}, "leave 'split' out"),
        (
            {
                "sources": {
                    "a": section | {"validation_split": "test"},
                    "a_validation": {"kind": "python_stdlib"},
                }
            },
            "needs the name 'a_validation' too",
        ),
        ({"source": section | {"max_samples": 0}}, "reads nothing"),
        (
            {"source": section | {"validation_split": "test"}, "validation_documents": 5},
            "held out already",
        ),
    ):
        with pytest.raises(ValidationError, match=sentence):
            DataConfig.model_validate(wrong)
    before = DataConfig.model_validate({"source": section | {"max_samples": -1}})
    assert not {"max_samples", "validation_split"} & before.named_sources["all"].model_dump().keys()
