"""Shards that grow beside the encoding are those that merging at the end writes."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.preprocess import coordinator, merge
from data_pipeline.preprocess import incremental_merge as growing
from data_pipeline.preprocess.coordinator import BuildResult, build
from data_pipeline.preprocess.incremental_merge import GrowingShards
from data_pipeline.preprocess.merge import Piece, ShardPlan, ShardRecord
from data_pipeline.preprocess.unit_record import SplitCounts, UnitRecord
from data_pipeline.preprocess.units import followed
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.indexed import IndexedWriter
from data_pipeline.shards.manifest import verify
from data_pipeline.shards.split import SPLITS
from pretrain.core.errors import DataError, StorageError
from tests.unit.data_pipeline.preprocess.test_build import DOCUMENTS, contents, jsonl, section


@pytest.fixture
def merged_at_the_end(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of shards that are written after the encoding."""
    names: list[str] = []
    write_shard = coordinator.write_shard

    def write(plan: ShardPlan) -> ShardRecord:
        names.append(plan.name)
        return write_shard(plan)

    monkeypatch.setattr(coordinator, "write_shard", write)
    return names


# A unit with a token in each split.
RECORD = UnitRecord(
    **dict.fromkeys(("lines", "records", "documents", "hashed", "bad_bytes"), 0),
    **{name: {} for name in ("bad", "left_out", "dropped", "edits", "notes")},
    unit=1,
    source="all",
    checksum="",
    lowest=None,
    highest=None,
    bad_examples={},
    splits=dict.fromkeys(SPLITS, SplitCounts(documents=1, tokens=1, utf8_bytes=1)),
)


def without_growing(config: DataConfig, output: Output) -> BuildResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrowingShards, "add", lambda *_: None)
        return build(config, output)


def two_sources(folder: Path, **settings: Any) -> DataConfig:
    first, second = (
        jsonl(folder / "first.jsonl", DOCUMENTS[:120]),
        jsonl(folder / "second.jsonl", DOCUMENTS[120:]),
    )
    sources = {
        "first": {"kind": "jsonl", "input": [str(first)]},
        "second": {"kind": "jsonl", "input": [str(second)]},
    }
    return section(first, source=None, sources=sources, unit_bytes=1000, **settings)


def test_one_shard_a_split_is_complete_when_the_encoding_is(
    tmp_path: Path, merged_at_the_end: list[str]
) -> None:
    config = two_sources(tmp_path)
    grown = build(config, Output(tmp_path / "grown"))
    assert merged_at_the_end == []
    without_growing(config, Output(tmp_path / "merged"))
    assert len(merged_at_the_end) == 4
    assert contents(tmp_path / "grown") == contents(tmp_path / "merged")
    assert set(contents(grown.folder)) >= {
        "train_first.bin",
        "train_second.bin",
        "validation_first.idx",
        "validation_second.idx",
    }


def test_of_many_shards_the_first_grows(tmp_path: Path, merged_at_the_end: list[str]) -> None:
    documents = [f"{number} " * 4000 for number in range(30)]
    config = section(
        jsonl(tmp_path / "big.jsonl", documents), unit_bytes=100_000, max_shard_bytes=65536
    )
    build(config, Output(tmp_path / "grown"))
    assert "train_00000" not in merged_at_the_end and "train_00001" in merged_at_the_end
    without_growing(config, Output(tmp_path / "merged"))
    assert contents(tmp_path / "grown") == contents(tmp_path / "merged")


def test_what_waits_for_duplicates_does_not_grow(
    tmp_path: Path, merged_at_the_end: list[str]
) -> None:
    config = section(
        jsonl(tmp_path / "twice.jsonl", DOCUMENTS * 2),
        unit_bytes=1000,
        cleaning={"exact_duplicates": True},
    )
    result = build(config, Output(tmp_path / "data"))
    assert sorted(merged_at_the_end) == ["train", "validation"]
    assert sum(split.documents for split in result.manifest.splits.values()) == len(DOCUMENTS)


def test_a_split_that_changes_leaves_nothing_of_what_grew(
    tmp_path: Path, merged_at_the_end: list[str]
) -> None:
    trained = build(
        section(jsonl(tmp_path / "many.jsonl", DOCUMENTS)), Output(tmp_path / "trained")
    ).manifest.tokenizer_path
    tokenizer = {"kind": "file", "path": str(trained)}
    config = section(
        jsonl(tmp_path / "few.jsonl", DOCUMENTS[:6]),
        unit_bytes=100,
        validation_share=1e-6,
        tokenizer=tokenizer,
    )
    result = build(config, Output(tmp_path / "data"))
    # The one document that is held out was in the training shard that had grown.
    assert sorted(merged_at_the_end) == ["train", "validation"]
    assert (
        result.manifest.splits["train"].documents,
        result.manifest.splits["validation"].documents,
    ) == (5, 1)


def test_a_full_disk_while_shards_grow_is_told_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        with pytest.raises(
            StorageError, match="No space left on device.*continues from where it stopped"
        ):
            build(config, Output(tmp_path / "data"))
    assert {path.name for path in (tmp_path / "data").iterdir()} == {".building"}
    build(config, Output(tmp_path / "data"))
    assert contents(tmp_path / "data") == contents(tmp_path / "undisturbed")


def test_units_are_followed_in_their_order_as_soon_as_all_before_them_are_there() -> None:
    seen: list[int] = []
    results = iter([replace(RECORD, unit=unit) for unit in (4, 2, 6, 3)])
    follow = followed(
        results, [1, 2, 3, 4, 6], {1: RECORD}, lambda record: seen.append(record.unit)
    )
    passed = [(record.unit, seen.copy()) for record in follow]
    assert passed == [(4, [1]), (2, [1]), (6, [1, 2]), (3, [1, 2])]
    assert seen == [1, 2, 3, 4, 6]


def test_a_shard_of_other_pieces_is_not_taken(tmp_path: Path) -> None:
    config = two_sources(tmp_path)
    seen: list[ShardRecord | None] = []
    take = GrowingShards._take

    def take_other(shards: GrowingShards, plan: ShardPlan) -> ShardRecord | None:
        seen.append(take(shards, replace(plan, pieces=[*plan.pieces, Piece(99)])))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrowingShards, "_take", take_other)
        result = build(config, Output(tmp_path / "data"))
    assert seen == [None] * 4
    verify(result.manifest, deep=True)


def test_a_build_that_goes_on_where_merging_had_begun_appends_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = two_sources(tmp_path)
    build(config, Output(tmp_path / "undisturbed"))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(coordinator.manifest_writer, "describe", stop)
        build(config, Output(tmp_path / "data"))
    monkeypatch.setattr(growing, "append_piece", stop)
    monkeypatch.setattr(merge, "append_piece", stop)
    build(config, Output(tmp_path / "data"))
    assert contents(tmp_path / "data") == contents(tmp_path / "undisturbed")


def test_workers_and_kills_inside_the_last_step_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = two_sources(tmp_path)
    build(config, Output(tmp_path / "undisturbed"))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(growing, "keep_record", stop)  # the shard has its place, and nothing says so
        build(config, Output(tmp_path / "data"), workers=2)
    assert list((tmp_path / "data" / ".building" / "shards").glob("*.bin"))
    build(config, Output(tmp_path / "data"), workers=2)
    assert contents(tmp_path / "data") == contents(tmp_path / "undisturbed")


def test_sources_of_any_number_need_few_open_files(tmp_path: Path) -> None:
    files = [jsonl(tmp_path / f"{number}.jsonl", DOCUMENTS[:3]) for number in range(40)]
    sources = {
        f"s{number}": {"kind": "jsonl", "input": [str(path)]} for number, path in enumerate(files)
    }
    config = section(files[0], source=None, sources=sources, validation_share=0.3)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE,
        (max(int(name) for name in os.listdir("/proc/self/fd")) + 20, limits[1]),
    )
    try:
        result = build(config, Output(tmp_path / "data"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sum(split.documents for split in result.manifest.splits.values()) == 120


def test_what_cannot_be_closed_on_a_full_disk_leaves_no_file_and_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "attempts").mkdir()
    monkeypatch.setattr(growing, "append_piece", lambda *_: None)
    leave = IndexedWriter.__exit__

    def full(writer: IndexedWriter, *error: Any) -> None:
        leave(writer, *error)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexedWriter, "__exit__", full)
    with (
        pytest.raises(DataError, match="the first"),
        GrowingShards(tmp_path, np.dtype("<u2"), None) as shards,
    ):
        shards.add(replace(RECORD, unit=0))
        while not shards._added[0].done():
            time.sleep(0.01)
        raise DataError("the first")
    assert list((tmp_path / "attempts").iterdir()) == []


@pytest.mark.timeout(60)
def test_a_build_that_ends_while_units_wait_to_be_appended_does_not_wait_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on, appended = threading.Event(), threading.Event(), list[int]()

    def slow(writer: Any, workspace: Path, split: str, piece: Piece) -> None:
        appended.append(piece.unit)
        begun.set()
        assert goes_on.wait(30)

    monkeypatch.setattr(growing, "append_piece", slow)
    with pytest.raises(KeyboardInterrupt), GrowingShards(tmp_path, np.dtype("<u2"), None) as shards:
        (tmp_path / "attempts").mkdir()
        for unit in range(3):
            shards.add(replace(RECORD, unit=unit))
        assert begun.wait(30)
        threading.Timer(0.2, goes_on.set).start()
        raise KeyboardInterrupt
    assert appended == [0, 0]  # both splits of the unit that was begun
    assert list((tmp_path / "attempts").iterdir()) == []
