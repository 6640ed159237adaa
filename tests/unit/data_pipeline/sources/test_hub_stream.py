"""A hub's stream from a real HTTP server that is busy, drops connections and stalls."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.sources.hub_stream import network_failure
from data_pipeline.sources.interface import Document, Patience, ReadContext, Source, open_source
from pretrain.config.load import load_recipe
from pretrain.core.errors import IO_FAILED, DataError, StorageError
from tests.support.hub_server import HubServer, hub_server, write_hub_folder
from tests.support.source_reading import SECTION
from tests.support.streams import Ranks, data_folder, flat

SHARDS, ROWS = 4, 40
PATIENCE = Patience(retries=2, timeout_seconds=1.0)


@pytest.fixture(params=["jsonl", "json.gz", "parquet"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def texts(kind: str, tmp_path: Path) -> list[str]:
    return write_hub_folder(tmp_path / "hub", SHARDS, ROWS, kind)


@pytest.fixture
def server(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubServer]:
    monkeypatch.setattr("data_pipeline.sources.interface.FIRST_WAIT_SECONDS", 0.05)
    with hub_server(tmp_path / "hub") as running:
        yield running


def section_of(server: HubServer, kind: str) -> dict[str, Any]:
    names = [f"data/train-{shard:05}-of-{SHARDS:05}.{kind}" for shard in range(SHARDS)]
    return {
        "kind": "datasets",
        "dataset": "parquet" if kind == "parquet" else "json",
        "data_files": [server.url(name) for name in names],
        "streaming": True,
    }


def open_hub(server: HubServer, kind: str) -> Source:
    section = SECTION.validate_python(section_of(server, kind))
    return open_source(section, ReadContext("all", patience=PATIENCE))


def read(source: Source) -> list[str]:
    results = [result for unit in source.units(1 << 20) for result in source.read(unit)]
    return [result.text for result in results if isinstance(result, Document)]


@pytest.mark.parametrize("fault", ["503", "429", "drop", "stall"])
def test_a_passing_failure_at_any_request_costs_no_document_and_repeats_none(
    fault: str, kind: str, server: HubServer, texts: list[str]
) -> None:
    assert read(open_hub(server, kind)) == texts
    source = open_hub(server, kind)
    units = source.units(1 << 20)
    found = []
    for number, unit in enumerate(units):
        server.faults = [fault] if number % 2 else []
        found += [result.text for result in source.read(unit) if isinstance(result, Document)]
        assert server.faults == []
    assert found == texts


@pytest.mark.parametrize("fault", ["503", "stall"])
def test_a_failure_that_stays_is_named_after_the_retries_with_the_code_of_input_and_output(
    fault: str, kind: str, server: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_hub(server, kind)
    [first, *_] = source.units(1 << 20)
    server.always = fault
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError) as raised:
        list(source.read(first))
    assert raised.value.exit_code == IO_FAILED and "\n" not in str(raised.value)
    assert "is not delivered" in str(raised.value) and "after 2 retries" in str(raised.value)
    said = [record.message for record in caplog.records if "next attempt" in record.message]
    assert [text.rpartition(" in ")[2] for text in said] == ["0.05 s", "0.1 s"]


def test_a_hub_that_is_away_at_the_start_is_waited_for_and_a_file_that_is_not_there_is_not(
    kind: str, server: HubServer
) -> None:
    server.always = "503"
    with pytest.raises(StorageError, match="status 503"):
        open_hub(server, kind).units(1 << 20)
    server.always = None
    requests = server.requests
    section = section_of(server, kind)
    section["data_files"] = [server.url("data/gone.jsonl")]
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        open_source(SECTION.validate_python(section), ReadContext("all", patience=PATIENCE)).units(
            1
        )
    assert server.requests < requests + 10


def test_from_a_row_on_only_what_is_needed_of_that_shard_is_asked_for(
    kind: str, tmp_path: Path
) -> None:
    # Larger than the blocks of five megabytes that the library asks for, and incompressible.
    rows, chance = 4000, random.Random(0)
    texts = [f"{row} {chance.randbytes(2000).hex()}" for row in range(2 * rows)]
    write_hub_folder(tmp_path / "large", 2, rows, kind, texts)
    with hub_server(tmp_path / "large") as server:
        section = section_of(server, kind)
        names = [f"data/train-{shard:05}-of-00002.{kind}" for shard in range(2)]
        section["data_files"] = [server.url(name) for name in names]
        source = open_source(SECTION.validate_python(section), ReadContext("all"))
        units = source.units(1 << 20)
        assert [unit.files for unit in units] == [(file,) for file in section["data_files"]]
        for row in (0, 1, 7, 8, 9, 255, 256, rows - 1, rows):
            server.bytes_sent.clear()
            found = source.read_from(units[1], row)
            first = next(found, None)
            expected = texts[rows + row] if row < rows else None
            assert (first.text if isinstance(first, Document) else None) == expected
            assert set(server.bytes_sent) == {f"train-00001-of-00002.{kind}"}
        server.bytes_sent.clear()
        assert len(list(source.read_from(units[1], rows - 5))) == 5
        size = (tmp_path / "large" / names[1]).stat().st_size
        # The footer and the last row groups of Parquet; of JSON the shard, at most twice the
        # block that the library looks at for its kind of compression.
        [sent] = server.bytes_sent.values()
        assert sent <= size * (0.5 if kind == "parquet" else 1.1) + (1 << 16), (sent, size)


def test_a_streamed_run_over_http_survives_failures_and_resumes_without_earlier_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.sources.interface.FIRST_WAIT_SECONDS", 0.05)
    monkeypatch.setattr("data_pipeline.loading.stream_loader.STEPS_AHEAD", 1)
    texts = write_hub_folder(tmp_path / "hub", SHARDS, ROWS)
    datasets = data_folder(tmp_path / "data")
    with hub_server(tmp_path / "hub") as server:
        settings = (
            f"data.source={json.dumps(section_of(server, 'jsonl') | {'split': 'train'})}",
            "data.streaming_lanes=1",
            "data.shuffle_buffer_documents=4",
            "data.streaming_timeout_seconds=1",
            "data.streaming_retries=3",
        )
        ranks = Ranks(datasets, 2, *settings)
        server.faults = ["503", "drop", "503"]
        steps = ranks.steps(0, 16)
        state = ranks.state(16)
        ranks.stop()
        seen = list(dict.fromkeys(text[:4] for text in flat(steps)))
        resumed = Ranks(datasets, 1, *settings)
        server.bytes_sent.clear()
        steps += resumed.resume(state, 16).steps(16, 1)
        # Shards that were trained on to their end are not asked for again.
        ended = {f"train-{int(name[1:]):05}-of-{SHARDS:05}.jsonl" for name in seen[:-1]}
        assert len(ended) == 3 and ended.isdisjoint(server.bytes_sent)
        steps += resumed.steps(17, 3)
        assert sorted(flat(steps)) == texts
        server.always = "503"
        with pytest.raises(StorageError, match="is not delivered"):
            resumed.steps(20, 20)


def test_a_tokenizer_is_trained_on_a_stream_and_reading_stops_with_enough(
    tmp_path: Path,
) -> None:
    write_hub_folder(tmp_path / "hub", 20, 100)
    section = {"kind": "datasets", "dataset": str(tmp_path / "hub")}
    recipe = load_recipe(
        "debug",
        [
            f"data.source={json.dumps(section)}",
            "data.streaming=true",
            "data.split_by=content",
            "data.tokenizer={kind: train_bpe, vocab_size: 270, sample_bytes: 8000}",
            "data.streaming_validation_documents=5",
            "data.validation_share=0.2",
        ],
    )
    first = build(recipe.data, Output(tmp_path / "one"))
    assert first.manifest.streamed and first.manifest.splits["validation"].documents == 5
    # Sixteen shards of 20, of each a sixteenth of the sample.
    again = build(recipe.data, Output(tmp_path / "two"))
    assert first.manifest.tokenizer.sha256 == again.manifest.tokenizer.sha256


def test_validation_comes_from_the_source_that_is_held_out_or_from_all_alike(
    tmp_path: Path,
) -> None:
    for name, shards in {"code": 6, "web": 2, "valid": 1}.items():
        texts = [f"{name} {row}".ljust(15, ".") for row in range(shards * 60)]
        write_hub_folder(tmp_path / name, shards, 60, texts=texts)

    def sources(**splits: str) -> str:
        return json.dumps(
            {
                name: {"kind": "datasets", "dataset": str(tmp_path / name), "split": split}
                for name, split in splits.items()
            }
        )

    common = [
        "data.source=null", "data.streaming=true", "data.split_by=content",
        "data.tokenizer={kind: train_bpe, vocab_size: 270, sample_bytes: 8000}",
        "data.streaming_validation_documents=8", "data.validation_share=0.2",
    ]  # fmt: skip
    whole = sources(code="train", valid="validation")
    recipe = load_recipe("debug", [*common, f"data.sources={whole}"])
    held_out = build(recipe.data, Output(tmp_path / "whole")).manifest
    assert {shard.source for shard in held_out.splits["validation"].shards} == {"valid"}
    assert held_out.splits["validation"].documents == 8
    weights = "data.mixture={kind: weights, weights: {code: 3, web: 1}}"
    recipe = load_recipe(
        "debug", [*common, f"data.sources={sources(code='hash', web='hash')}", weights]
    )
    shared = build(recipe.data, Output(tmp_path / "shared")).manifest
    counts = {shard.source: shard.documents for shard in shared.splits["validation"].shards}
    assert counts == {"code": 4, "web": 4}


def test_what_asking_again_cannot_help_is_no_failure_of_the_network() -> None:
    class Status(Exception):
        def __init__(self, status: int) -> None:
            self.status = status

    assert network_failure(Status(503), 1.0) == "status 503"
    assert network_failure(Status(404), 1.0) is None and network_failure(Status(401), 1.0) is None
    assert network_failure(ConnectionResetError("reset"), 1.0) == "ConnectionResetError reset"
    assert network_failure(TimeoutError(), 1.0) == "TimeoutError"
    assert network_failure(ConnectionError("(OfflineModeIsEnabled)"), 1.0) is None
    assert network_failure(ValueError("Bad split"), 1.0) is None
    outer = RuntimeError("outer")
    outer.__cause__ = Status(500)
    assert network_failure(outer, 1.0) == "status 500"
    assert [*Patience(8).waits()] == [1, 2, 4, 8, 16, 32, 60, 60]
