"""A hub's stream over ranks: equal batches, each document once an epoch, resumed on any ranks."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.preprocess.reader import Reader
from data_pipeline.shards.datasets import Datasets
from pretrain.core.errors import CheckpointError, ConfigError, DataError
from tests.support.hub_server import write_hub_folder
from tests.support.json_damage import damaged
from tests.support.streams import Ranks, data_folder, flat, hub_source

SHARDS, ROWS, BATCH = 8, 30, 8
EPOCH = SHARDS * ROWS // BATCH


@pytest.fixture
def datasets(tmp_path: Path) -> Datasets:
    return data_folder(tmp_path / "data")


@pytest.fixture(params=["jsonl", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list[str]]:
    texts = write_hub_folder(tmp_path / "hub", SHARDS, ROWS, request.param)
    return f"data.source={hub_source(tmp_path / 'hub')}", texts


def test_any_number_of_ranks_trains_the_same_batches_and_each_document_once_an_epoch(
    source: tuple[str, list[str]], datasets: Datasets
) -> None:
    section, texts = source
    runs = {
        size: Ranks(datasets, size, section, "data.shuffle_buffer_documents=64").steps(0, EPOCH + 5)
        for size in (1, 2, 4)
    }
    assert runs[1] == runs[2] == runs[4]
    assert sorted(flat(runs[1][:EPOCH])) == texts
    assert len(set(flat(runs[1][EPOCH:]))) == 5 * BATCH
    # Shuffled, by a seed, and otherwise in every epoch.
    assert flat(runs[1][:EPOCH]) != texts and runs[1][:5] != runs[1][EPOCH:]
    other = Ranks(datasets, 1, section, "data.shuffle_buffer_documents=64", "seed=8").steps(0, 5)
    assert other != runs[1][:5]
    plain = Ranks(datasets, 1, section, "data.shuffle_buffer_documents=0").steps(0, 5)
    rows = [text[5:10] for text in plain[0]]
    assert rows == ["00000"] * 8 and plain != runs[1][:5]


def test_micro_batches_of_another_size_have_the_same_documents_in_a_step(
    source: tuple[str, list[str]], datasets: Datasets
) -> None:
    section, _ = source
    one = Ranks(datasets, 2, section, micro=1).steps(0, 6)
    other = Ranks(datasets, 1, section, micro=4).steps(0, 6)
    assert [sorted(step) for step in one] == [sorted(step) for step in other]


def test_a_run_that_changes_its_ranks_at_each_resume_loses_and_repeats_no_document(
    source: tuple[str, list[str]], datasets: Datasets
) -> None:
    section, texts = source
    settings = (section, "data.shuffle_buffer_documents=40")
    straight = Ranks(datasets, 1, *settings).steps(0, EPOCH + 7)
    found: list[list[str]] = []
    ranks = Ranks(datasets, 2, *settings)
    for size, until in ((2, 5), (4, 12), (1, 13), (8, 25), (2, EPOCH + 7)):
        if found:
            state = ranks.state(len(found))
            ranks = Ranks(datasets, size, *settings).resume(state, len(found))
        found += ranks.steps(len(found), until - len(found))
    assert found == straight and sorted(flat(found[:EPOCH])) == texts


def test_a_resume_reads_no_record_before_the_groups_that_it_was_in(
    source: tuple[str, list[str]], datasets: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, _ = source
    buffer, ahead = 40, 4
    monkeypatch.setattr("data_pipeline.loading.stream_loader.STEPS_AHEAD", ahead)
    settings = (section, f"data.shuffle_buffer_documents={buffer}")
    before = Ranks(datasets, 2, *settings)
    trained = flat(before.steps(0, EPOCH // 2))
    state = before.state(EPOCH // 2)
    before.stop()
    read: list[str] = []
    results = Reader._results

    def counted(reader: Reader) -> Any:
        for result in results(reader):
            read.append(result.text)
            yield result

    monkeypatch.setattr(Reader, "_results", counted)
    after = Ranks(datasets, 2, *settings)
    assert read == []
    coming = flat(after.resume(state, EPOCH // 2).steps(EPOCH // 2, 1))
    assert set(coming) <= set(read)
    again = set(read) & set(trained)
    # Of each of the eight lanes the beginning of one group.
    assert len(again) <= buffer
    # Ahead of training: so many steps, what each lane's group holds more, and the one after it.
    assert len(read) <= len(again) + (1 + ahead) * BATCH + 2 * buffer + SHARDS
    assert max(Counter(read).values()) == 1


def test_a_rank_reads_its_own_shards_only(
    source: tuple[str, list[str]], datasets: Datasets
) -> None:
    section, _ = source
    ranks = Ranks(datasets, 2, section)
    places: list[set[str]] = []
    for loader in ranks.loaders:
        for step in range(4):
            loader.step_batches(step)
        places.append(
            {
                documents.place
                for step in range(4)
                for origin in loader.origins(step)
                for documents in origin.documents
            }
        )
    assert places[0].isdisjoint(places[1]) and all(places)
    names = [origin.documents for origin in ranks.loaders[0].origins(0)]
    assert sum(not documents for documents in names) == BATCH // 2


def test_rows_of_a_shard_are_dealt_where_there_are_fewer_shards_than_lanes(
    tmp_path: Path, datasets: Datasets, caplog: pytest.LogCaptureFixture
) -> None:
    texts = write_hub_folder(tmp_path / "few", 1, 64)
    section = f"data.source={hub_source(tmp_path / 'few')}"
    with caplog.at_level(logging.WARNING):
        shared = Ranks(datasets, 2, section)
        assert shared.lanes == 1
    assert "2 ranks share 1 lanes of the stream: each reads 1 of them" in caplog.text
    steps = shared.steps(0, 8)
    assert sorted(flat(steps)) == texts == sorted(flat(Ranks(datasets, 1, section).steps(0, 8)))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        dealt = Ranks(datasets, 2, section, "data.streaming_lanes=4")
    assert "'all' has 1 units for 4 lanes: each unit is read by 4 lanes" in caplog.text
    assert "share" not in caplog.text and dealt.lanes == 4
    first = dealt.steps(0, 3)
    rest = Ranks(datasets, 4, section, "data.streaming_lanes=4").resume(dealt.state(3), 3)
    assert sorted(flat([*first, *rest.steps(3, 5)])) == texts
    with pytest.raises(ConfigError, match="no divisor of train.global_batch_size"):
        Ranks(datasets, 1, section, "data.streaming_lanes=3")


def test_a_mixture_keeps_its_shares_in_every_lane_and_over_resumes(
    tmp_path: Path, datasets: Datasets
) -> None:
    sizes = {"a": 8, "b": 4, "c": 2}
    texts = {}
    for name, shards in sizes.items():
        rows = [
            f"{name}{shard:02}r{row:04}".ljust(15, ".")
            for shard in range(shards)
            for row in range(40)
        ]
        texts[name] = write_hub_folder(tmp_path / name, shards, 40, texts=rows)
    sections = ", ".join(f'"{name}": {hub_source(tmp_path / name)}' for name in sizes)
    settings = (
        f"data.sources={{{sections}}}",
        "data.mixture={kind: weights, weights: {a: 7, b: 2, c: 1}}",
        "data.shuffle_buffer_documents=64",
    )
    straight = Ranks(datasets, 1, *settings).steps(0, 20)
    ranks = Ranks(datasets, 2, *settings)
    found = ranks.steps(0, 9)
    found += Ranks(datasets, 4, *settings).resume(ranks.state(9), 9).steps(9, 11)
    assert found == straight
    counts = Counter(text[0] for text in flat(found))
    assert counts == {"a": 112, "b": 32, "c": 16}
    # Eight samples side by side have the shares to within one sample, in every step.
    for step in found:
        of_step = Counter(text[0] for text in step)
        assert abs(of_step["a"] - 5.6) < 1 and abs(of_step["b"] - 1.6) < 1.6
    assert all(len(set(flat(found)) & set(texts[name])) == counts[name] for name in sizes)


def test_held_out_sources_take_no_part_in_the_mixture(tmp_path: Path, datasets: Datasets) -> None:
    texts = write_hub_folder(tmp_path / "train", 2, 16)
    write_hub_folder(tmp_path / "valid", 1, 8, texts=[f"held out {n}" for n in range(8)])
    valid = hub_source(tmp_path / "valid").replace('"split": "train"', '"split": "validation"')
    sections = f'{{"train": {hub_source(tmp_path / "train")}, "valid": {valid}}}'
    for mixture in ([], ["data.mixture={kind: weights, weights: {train: 1.0}}"]):
        ranks = Ranks(datasets, 1, f"data.sources={sections}", *mixture)
        assert sorted(flat(ranks.steps(0, 4))) == texts
    with pytest.raises(ConfigError, match="nothing to train on"):
        Ranks(datasets, 1, f'data.sources={{"valid": {valid}}}')


def test_another_buffer_or_other_lanes_are_refused_and_so_is_an_old_position(
    source: tuple[str, list[str]], datasets: Datasets
) -> None:
    section, _ = source
    ranks = Ranks(datasets, 2, section)
    ranks.steps(0, 2)
    state = ranks.state(2)
    for setting in ("data.shuffle_buffer_documents=9", "data.streaming_lanes=2"):
        with pytest.raises(DataError, match="how they are read, are not what they were"):
            Ranks(datasets, 1, section, setting).resume(state, 2)
    old = {
        "start_sample": 0,
        "weights": {"all": 1.0},
        "sources": {"all": {"fingerprint": "x", "place": [0, 0, 5, 3]}},
    }
    with pytest.raises(DataError, match="earlier version of this program, which read streams"):
        Ranks(datasets, 1, section).resume(old, 2)


def test_a_damaged_position_is_a_sentence_or_the_right_documents(
    tmp_path: Path, datasets: Datasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.loading.stream_loader.STEPS_AHEAD", 1)
    write_hub_folder(tmp_path / "hub", SHARDS, ROWS)
    settings = (f"data.source={hub_source(tmp_path / 'hub')}", "data.streaming_lanes=2")
    ranks = Ranks(datasets, 1, *settings)
    ranks.steps(0, 3)
    state = ranks.state(3)
    expected = ranks.step(3)
    refused = 0
    for what, changed in damaged(state):
        try:
            ranks.resume(changed, 3).loaders[0].step_batches(3)
        except (CheckpointError, DataError) as error:
            assert "\n" not in str(error), what
            refused += 1
    assert refused > 100
    assert ranks.resume(state, 3).step(3) == expected
