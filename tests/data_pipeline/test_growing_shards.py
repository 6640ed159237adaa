"""Shards that grow beside the encoding are those that merging at the end writes."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.build import coordinator, growing
from data_pipeline.build.coordinator import BuildResult, build
from data_pipeline.build.growing import GrowingShards
from data_pipeline.build.merge import Piece, ShardPlan
from data_pipeline.build.workspace import Output
from pretrain.config.data_schema import DataConfig
from pretrain.config.errors import StorageError
from tests.data_pipeline.test_build import DOCUMENTS, contents, jsonl, section


@pytest.fixture
def merged_at_the_end(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of shards that are written after the encoding."""
    names: list[str] = []
    write_shard = coordinator.write_shard

    def write(plan: ShardPlan) -> dict[str, Any]:
        names.append(plan.name)
        return write_shard(plan)

    monkeypatch.setattr(coordinator, "write_shard", write)
    return names


def without_growing(config: DataConfig, output: Output) -> BuildResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrowingShards, "add", lambda *_: None)
        return build(config, output)


def two_sources(folder: Path, **settings: Any) -> DataConfig:
    first, second = jsonl(folder / "first.jsonl", DOCUMENTS[:120]), jsonl(folder / "second.jsonl", DOCUMENTS[120:])
    sources = {"first": {"kind": "jsonl", "input": [str(first)]}, "second": {"kind": "jsonl", "input": [str(second)]}}
    return section(first, source=None, sources=sources, unit_bytes=1000, **settings)


def test_one_shard_a_split_is_complete_when_the_encoding_is(tmp_path: Path, merged_at_the_end: list[str]) -> None:
    config = two_sources(tmp_path)
    grown = build(config, Output(tmp_path / "grown"))
    assert merged_at_the_end == []
    without_growing(config, Output(tmp_path / "merged"))
    assert len(merged_at_the_end) == 4
    assert contents(tmp_path / "grown") == contents(tmp_path / "merged")
    assert set(contents(grown.folder)) >= {"train_first.bin", "train_second.bin", "validation_first.idx", "validation_second.idx"}


def test_of_many_shards_the_first_grows(tmp_path: Path, merged_at_the_end: list[str]) -> None:
    documents = [f"{number} " * 4000 for number in range(30)]
    config = section(jsonl(tmp_path / "big.jsonl", documents), unit_bytes=100_000, max_shard_bytes=65536)
    build(config, Output(tmp_path / "grown"))
    assert "train_00000" not in merged_at_the_end and "train_00001" in merged_at_the_end
    without_growing(config, Output(tmp_path / "merged"))
    assert contents(tmp_path / "grown") == contents(tmp_path / "merged")


def test_what_waits_for_duplicates_does_not_grow(tmp_path: Path, merged_at_the_end: list[str]) -> None:
    config = section(jsonl(tmp_path / "twice.jsonl", DOCUMENTS * 2), unit_bytes=1000, cleaning={"exact_duplicates": True})
    result = build(config, Output(tmp_path / "data"))
    assert sorted(merged_at_the_end) == ["train", "validation"]
    assert sum(split.documents for split in result.manifest.splits.values()) == len(DOCUMENTS)


def test_a_split_that_changes_leaves_nothing_of_what_grew(tmp_path: Path, merged_at_the_end: list[str]) -> None:
    trained = build(section(jsonl(tmp_path / "many.jsonl", DOCUMENTS)), Output(tmp_path / "trained")).manifest.tokenizer_path
    tokenizer = {"kind": "file", "path": str(trained)}
    config = section(jsonl(tmp_path / "few.jsonl", DOCUMENTS[:6]), unit_bytes=100, validation_share=1e-6, tokenizer=tokenizer)
    result = build(config, Output(tmp_path / "data"))
    # The one document that is held out was in the training shard that had grown.
    assert sorted(merged_at_the_end) == ["train", "validation"]
    assert (result.manifest.splits["train"].documents, result.manifest.splits["validation"].documents) == (5, 1)


def test_a_full_disk_while_shards_grow_is_told_and_the_next_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = two_sources(tmp_path)
    build(config, Output(tmp_path / "undisturbed"))
    append, appended = growing.append_piece, []

    def fails_later(*arguments: Any) -> None:
        appended.append(arguments)
        if len(appended) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(growing, "append_piece", fails_later)
        with pytest.raises(StorageError, match="No space left on device.*goes on where it stopped"):
            build(config, Output(tmp_path / "data"))
    assert {path.name for path in (tmp_path / "data").iterdir()} == {".building"}
    build(config, Output(tmp_path / "data"))
    assert contents(tmp_path / "data") == contents(tmp_path / "undisturbed")


def test_units_are_followed_in_their_order_as_soon_as_all_before_them_are_there() -> None:
    followed: list[int] = []
    results = iter([{"unit": unit} for unit in (4, 2, 6, 3)])
    follow = coordinator._followed(results, [1, 2, 3, 4, 6], {1: {"unit": 1}}, lambda record: followed.append(record["unit"]))
    passed = [(record["unit"], followed.copy()) for record in follow]
    assert passed == [(4, [1]), (2, [1]), (6, [1, 2]), (3, [1, 2])]
    assert followed == [1, 2, 3, 4, 6]


def test_a_shard_of_other_pieces_is_not_taken(tmp_path: Path) -> None:
    config = two_sources(tmp_path)
    seen: list[dict[str, Any] | None] = []
    take = GrowingShards.take

    def take_other(shards: GrowingShards, plan: ShardPlan) -> dict[str, Any] | None:
        seen.append(take(shards, ShardPlan(plan.name, plan.split, plan.source, [*plan.pieces, Piece(99)], plan.dtype, plan.workspace)))
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrowingShards, "take", take_other)
        build(config, Output(tmp_path / "data"))
    assert seen == [None] * 4


@pytest.mark.timeout(60)
def test_a_build_that_ends_while_units_wait_to_be_appended_does_not_wait_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def slow(*_: Any) -> None:
        begun.set()
        assert goes_on.wait(30)

    monkeypatch.setattr(growing, "append_piece", slow)
    counts = {"tokens": 1}
    with pytest.raises(KeyboardInterrupt), GrowingShards(tmp_path, np.dtype("<u2"), None) as shards:
        (tmp_path / "attempts").mkdir()
        for unit in range(3):
            shards.add({"unit": unit, "source": "all", "splits": {"train": counts, "validation": counts}})
        assert begun.wait(30)
        threading.Timer(0.2, goes_on.set).start()
        raise KeyboardInterrupt
    assert list((tmp_path / "attempts").iterdir()) == []
