"""The engine of a build: found out while units are encoded, and every unit of a finished build is
that engine's.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.preprocess import coordinator, engine
from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.pool import Pool
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.indexed import IndexedReader
from data_pipeline.tokenizer import engine_choice
from data_pipeline.tokenizer.tokenizer import load_tokenizer

DOCUMENTS = [
    f"document {number} " + " ".join(str(number * step % 97) for step in range(30))
    for number in range(200)
]


def section(path: Path, documents: list[str]) -> DataConfig:
    """The data section of a new file of JSON lines, in units of 1,000 bytes."""
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return DataConfig.model_validate(
        {
            "source": {"kind": "jsonl", "input": [str(path)]},
            "tokenizer": {"kind": "train_bpe", "vocab_size": 300},
            "validation_share": 0.2,
            "unit_bytes": 1000,
        }
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Encoded:
    """The units that were encoded in earnest, by number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at_most: int | None = None) -> None:
        self.units: list[int] = []
        self._encode_unit, self._at_most = coordinator.encode_unit, at_most
        monkeypatch.setattr(coordinator, "encode_unit", self)

    def __call__(self, job: Any) -> Any:
        if len(self.units) == self._at_most:
            raise KeyboardInterrupt
        self.units.append(job[1])
        return self._encode_unit(job)


@pytest.mark.parametrize("again", ["tokenizers", "fastokens"])
def test_units_of_a_stopped_build_stay_only_where_the_engine_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    config, output = section(tmp_path / "corpus.jsonl", DOCUMENTS), Output(tmp_path / "data")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Encoded(patch, at_most=5)
        build(config, output, engine="tokenizers")
    encoded = Encoded(monkeypatch)
    build(config, output, engine=again)
    assert min(encoded.units) == (5 if again == "tokenizers" else 0)


@pytest.mark.parametrize(
    ("likely", "installed", "stay"),
    [("fastokens", True, True), ("tiktoken", True, False), ("tiktoken", False, False)],
)
def test_units_encoded_while_the_engine_is_chosen_stay_only_if_it_was_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, likely: str, installed: bool, stay: bool
) -> None:
    config = section(tmp_path / "corpus.jsonl", DOCUMENTS)
    clean = build(config, Output(tmp_path / "clean"), engine="tokenizers")
    ahead: list[int] = []
    enough = threading.Event()
    choose, encode_ahead = engine.choose, engine.encode_ahead

    def encode_and_note(job: Any) -> None:
        encode_ahead(job)
        ahead.append(job[1])
        if len(ahead) == 3:
            enough.set()

    monkeypatch.setattr(engine, "WORTH_CHOOSING_FOR", 0)
    monkeypatch.setattr(engine, "LIKELY_ENGINE", likely)
    monkeypatch.setattr(engine, "encode_ahead", encode_and_note)
    monkeypatch.setattr(engine, "choose", lambda job: choose(job) if enough.wait(60) else "")
    # A clock that runs ever slower: the engine measured after the tokenizers library is faster.
    clock = (math.sqrt(call) for call in itertools.count())
    monkeypatch.setattr(engine_choice, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    if not installed:
        monkeypatch.setitem(sys.modules, likely, None)
    encoded = Encoded(monkeypatch)
    with ThreadPoolExecutor(2) as executor:
        result = build(config, Output(tmp_path / "data"), pool=Pool(executor, 2))
    assert result.engine == "fastokens" and len(ahead) >= 3
    assert set(ahead).isdisjoint(encoded.units) == stay
    assert contents(tmp_path / "data") == contents(clean.folder)


def test_a_later_build_of_the_same_process_has_its_own_tokenizer(tmp_path: Path) -> None:
    for words in ("alpha beta gamma delta ", "gamma gamma delta alpha eta "):
        config = section(
            tmp_path / "corpus.jsonl", [words * 9 + str(number) for number in range(50)]
        )
        manifest = build(config, Output(tmp_path / "data"), fresh=True).manifest
        reader = IndexedReader(manifest.folder / manifest.splits["train"].shards[0].prefix)
        assert load_tokenizer(manifest.tokenizer_path).decode(reader[0].tolist()).startswith(words)
