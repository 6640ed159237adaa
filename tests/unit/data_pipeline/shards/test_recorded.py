"""A folder that was not built with the recipe's data section is reported in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.preprocess.coordinator import BuildResult
from data_pipeline.shards.datasets import load_datasets
from data_pipeline.shards.recorded import data_warnings


@pytest.mark.parametrize(
    "changes,words",
    [
        ({}, None),
        ({"source": {"kind": "jsonl", "input": ["a"]}}, "of the source 'all' (text), not of"),
        ({"tokenizer": {"kind": "train_bpe", "vocab_size": 290}}, "has 300 entries, not 290"),
        # There was not enough text for more.
        ({"tokenizer": {"kind": "train_bpe", "vocab_size": 900}}, None),
        ({"tokenizer": {"kind": "file", "path": "t.json", "vocab_size": 900}}, "not 900"),
        (
            {"tokenizer": {"kind": "train_bpe", "vocab_size": 300, "append_eod": False}},
            "their append_eod is true",
        ),
        ({"corpora": {"one": "somewhere"}}, None),
    ],
)
def test_what_differs_from_the_recipe_is_named(
    built: BuildResult,
    text_config: Callable[..., DataConfig],
    changes: dict[str, object],
    words: str | None,
) -> None:
    folder = str(built.folder)
    section = text_config("anywhere/*.txt").model_dump(exclude_unset=True) | changes
    found = data_warnings(DataConfig.model_validate(section), load_datasets({"": folder}))
    assert len(found) == (words is not None)
    assert all(folder in sentence and str(words) in sentence for sentence in found)
    assert not any("\n" in sentence for sentence in found)
