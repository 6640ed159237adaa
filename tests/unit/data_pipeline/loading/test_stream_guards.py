"""A stream never trains on what is held out, and judges its source alike on any number of ranks."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.loading.document_groups import LaneDocuments, PassShares, Start, StreamedSource
from data_pipeline.loading.lanes import choose_lanes, choose_parts, lanes_of_rank
from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.datasets import load_datasets
from data_pipeline.shards.recorded import check_streamed
from pretrain.core.errors import DataError

ROWS = 6000


def stream(folder: Path, source: dict[str, Any], **fields: Any) -> StreamedSource:
    config = DataConfig.model_validate(
        {"source": source, "streaming": True, "validation_share": 0.0, **fields}
    )
    datasets: Any = SimpleNamespace(first=SimpleNamespace(folder=folder))
    return StreamedSource(config, "all", datasets, seed=0)


def read_pass(source: StreamedSource, own: list[int], lanes: int, start: Start) -> int:
    """Documents of one pass over a rank's lanes, alternating between them."""
    parts = choose_parts(len(source.units), lanes)
    shares = PassShares(source, own, lanes, parts)
    live = [LaneDocuments(source, lane, lanes, parts, shares)._pass(start) for lane in own]
    found = 0
    while live:
        for groups in list(live):
            group = next(groups, None)
            found += 0 if group is None else len(group.texts)
            if group is None:
                live.remove(groups)
    return found


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 compressed files, of which one is damaged after a fifth of its bytes."""
    folder = tmp_path_factory.mktemp("zipped")
    generator = random.Random(1)
    for number in range(64):
        rows = [{"text": f"{number} {row} {generator.random()}"} for row in range(300)]
        content = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
        path = folder / f"{number:02}.jsonl.gz"
        path.write_bytes(damaged(content) if number == 5 else content)
    return folder


def damaged(content: bytes) -> bytes:
    kept = len(content) // 5
    return content[:kept] + random.Random(2).randbytes(len(content) - kept)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("epoch", [0, 1])
def test_one_damaged_file_of_many_stops_no_number_of_ranks(
    zipped: Path, ranks: int, epoch: int
) -> None:
    source = stream(zipped, {"kind": "jsonl", "input": [str(zipped / "*.gz")]})
    lanes = choose_lanes(len(source.units), 16)
    found = [
        read_pass(source, lanes_of_rank(lanes, rank, ranks), lanes, Start(epoch, 0, 0))
        for rank in range(ranks)
    ]
    assert 63 * 300 * 0.98 < sum(found) < 64 * 300


def test_many_damaged_files_stop_every_number_of_ranks(zipped: Path, tmp_path: Path) -> None:
    for path in zipped.iterdir():
        content = path.read_bytes()
        is_odd = int(path.name[:2]) % 2
        (tmp_path / path.name).write_bytes(damaged(content) if is_odd else content)
    source = stream(tmp_path, {"kind": "jsonl", "input": [str(tmp_path / "*.gz")]})
    lanes = choose_lanes(len(source.units), 16)
    for ranks in (1, 2, 8):
        with pytest.raises(DataError, match="bad"):
            for rank in range(ranks):
                read_pass(source, lanes_of_rank(lanes, rank, ranks), lanes, Start(0, 0, 0))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of which one row in a hundred is null, and the last but five."""
    bad = {*random.Random(0).sample(range(ROWS), ROWS // 100), ROWS - 6}
    texts = [None if row in bad else f"{row} " + "word " * 40 for row in range(ROWS)]
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=1000)
    return path


@pytest.mark.parametrize("lanes", [1, 8, 16])
def test_bad_rows_count_alike_however_many_lanes_share_a_unit(rows: Path, lanes: int) -> None:
    source = stream(rows.parent, {"kind": "parquet", "input": [str(rows)]})
    assert read_pass(source, list(range(lanes)), lanes, Start(0, 0, 0)) > 0.9 * ROWS * 0.99


@pytest.mark.parametrize("record", [0, ROWS // 2, ROWS - 11, ROWS - 6])
def test_a_bad_row_after_a_resume_is_one_row(rows: Path, record: int) -> None:
    source = stream(rows.parent, {"kind": "parquet", "input": [str(rows)]})
    assert read_pass(source, [0], 1, Start(0, 0, record)) > 0


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for number in range(4):
        lines = [json.dumps({"text": f"{number} {row}", "id": f"{row}"}) for row in range(300)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_stream_beside_another_held_out_set_is_refused(texts: Path) -> None:
    source = {"kind": "jsonl", "input": [str(texts / "*.jsonl")], "id_field": "id"}
    fields: dict[str, Any] = {
        "source": source,
        "streaming": True,
        "tokenizer": {"kind": "train_bpe", "vocab_size": 300},
        "validation_share": 0.2,
        "streaming_validation_documents": 50,
    }
    config = DataConfig.model_validate(fields)
    build(config, Output(texts / "data"), workers=1, progress=False)
    datasets = load_datasets({"": str(texts / "data")})
    check_streamed(config, datasets)
    check_streamed(config.model_copy(update={"shuffle_buffer_documents": 0}), datasets)
    for change in (
        {"validation_share": 0.1},
        {"split_by": "id"},
        {"cleaning": {"normalize": {}}},
        {"source": source | {"split": "train"}},
    ):
        other = DataConfig.model_validate(fields | change)
        with pytest.raises(DataError, match="was held out by other settings"):
            check_streamed(other, datasets)
    policy = {"kind": "train_bpe", "vocab_size": 300, "append_eod": False}
    with pytest.raises(DataError, match="was encoded otherwise"):
        check_streamed(DataConfig.model_validate(fields | {"tokenizer": policy}), datasets)


def test_beside_a_source_that_is_held_out_nothing_else_is(texts: Path) -> None:
    sources = {
        "a": {"kind": "jsonl", "input": [str(texts / "[012].jsonl")]},
        "v": {"kind": "jsonl", "input": [str(texts / "3.jsonl")], "split": "validation"},
    }
    config = DataConfig.model_validate(
        {"sources": sources, "streaming": True, "validation_share": 0.2}
    )
    datasets: Any = SimpleNamespace(first=SimpleNamespace(folder=texts))
    assert config.held_out_sources == ["v"]
    source = StreamedSource(config, "a", datasets, seed=0)
    assert read_pass(source, [0], 1, Start(0, 0, 0)) == 900


def test_tokens_that_are_made_otherwise_are_another_stream(texts: Path) -> None:
    source = {"kind": "jsonl", "input": [str(texts / "*.jsonl")]}
    fingerprints = {
        stream(
            texts, source, tokenizer={"kind": "train_bpe", "vocab_size": 300} | policy
        ).fingerprint
        for policy in ({}, {"append_eod": False}, {"parse_special_tokens": True})
    }
    assert len(fingerprints) == 3
