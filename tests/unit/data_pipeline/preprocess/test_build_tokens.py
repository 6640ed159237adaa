"""Builds with tokenizers of unusual kinds: without any special token, with dropout, parsing special
tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.import_shards import import_shards
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.datasets import load_datasets
from data_pipeline.shards.manifest import Manifest, load_manifest, verify
from data_pipeline.shards.token_stream import open_split
from data_pipeline.tokenizer.config import TrainBPE
from data_pipeline.tokenizer.training import train_bpe
from pretrain.core.errors import ConfigError, DataError

TEXTS = [f"document {number} <|im_start|>user says {number * 7}<|im_end|>" for number in range(60)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def tokenizer_file(path: Path, **changes: Any) -> Path:
    """A trained tokenizer whose model or file is changed afterwards."""
    config = TrainBPE(vocab_size=300, reserved_tokens=["<|im_start|>", "<|im_end|>"])
    content = json.loads(train_bpe(TEXTS, config).content)
    content |= {name: value for name, value in changes.items() if name in content}
    content["model"] |= {name: value for name, value in changes.items() if name not in content}
    path.write_text(json.dumps(content))
    return path


def section(corpus: Path, tokenizer: Path, **policy: Any) -> DataConfig:
    return DataConfig.model_validate(
        {
            "source": {"kind": "jsonl", "input": [str(corpus)]},
            "tokenizer": {"kind": "file", "path": str(tokenizer), **policy},
            "validation_share": 0.2,
        }
    )


def tokens(manifest: Manifest) -> np.ndarray:
    stream = open_split(manifest, "train")
    return stream.read(0, stream.num_tokens)


def without_special_tokens(path: Path) -> Path:
    content = json.loads(tokenizer_file(path).read_text())
    for token in content["added_tokens"]:
        del content["model"]["vocab"][token["content"]]
    lowest = min(content["model"]["vocab"].values())
    vocabulary = {name: number - lowest for name, number in content["model"]["vocab"].items()}
    content["model"]["vocab"] = vocabulary
    path.write_text(json.dumps(content | {"added_tokens": []}))
    return path


def test_a_tokenizer_without_special_tokens_is_enough_where_none_is_written(
    corpus: Path, tmp_path: Path
) -> None:
    tokenizer = without_special_tokens(tmp_path / "plain.json")
    with pytest.raises(DataError, match="no end-of-document token for append_eod"):
        build(section(corpus, tokenizer), Output(tmp_path / "data"))
    config = section(corpus, tokenizer, append_eod=False)
    manifest = build(config, Output(tmp_path / "data")).manifest
    assert (manifest.tokenizer.eod_id, manifest.tokenizer.pad_id) == (None, None)
    verify(load_manifest(tmp_path / "data"), deep=True)
    # What fills a last window, without loss.
    assert load_datasets({"": str(tmp_path / "data")}).pad_id == 0
    shards = [str(tmp_path / "data" / "train.bin")]
    imported = import_shards(shards, [], config, Output(tmp_path / "imported"))
    assert imported.manifest.tokenizer.eod_id is None
    assert not imported.manifest.tokenizer.append_eod
    assert any("no token that ends a document" in note for note in imported.notes)


def test_special_tokens_in_texts_are_parsed_on_request(corpus: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_file(tmp_path / "chat.json")
    ids = {"<|im_start|>": 1, "<|im_end|>": 2}
    plain = build(section(corpus, tokenizer), Output(tmp_path / "plain")).manifest
    assert not set(ids.values()) & set(tokens(plain).tolist())
    config = section(corpus, tokenizer, parse_special_tokens=True)
    parsed = build(config, Output(tmp_path / "parsed")).manifest
    documents = parsed.splits["train"].documents
    assert [(tokens(parsed) == number).sum() for number in ids.values()] == [documents, documents]
    assert parsed.tokenizer.parse_special_tokens and plain.tokenizer.parse_special_tokens is None
    assert "parse_special_tokens" not in (tmp_path / "plain" / "manifest.json").read_text()
    assert parsed.fingerprint != plain.fingerprint
    with pytest.raises(ConfigError, match="another corpus, tokenizer or cleaning"):
        build(config, Output(tmp_path / "plain"))


def test_dropout_in_the_file_leaves_builds_equal(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exact = tokenizer_file(tmp_path / "exact.json")
    dropping = tokenizer_file(tmp_path / "dropping.json", dropout=0.1)
    found = [
        build(section(corpus, tokenizer), Output(tmp_path / name)).manifest
        for name, tokenizer in (("one", dropping), ("two", dropping), ("three", exact))
    ]
    for manifest in found[1:]:
        assert np.array_equal(tokens(manifest), tokens(found[0]))
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == dropping.read_bytes()
    assert caplog.text.count("has a dropout of 0.1, which is off while texts are encoded") == 2
