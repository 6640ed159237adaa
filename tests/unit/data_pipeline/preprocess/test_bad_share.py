"""A build that loses more than a small share of any source stops with code 3, and says of which,
how much, why, and what to do.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.preprocess.bad_share import BadShares
from data_pipeline.preprocess.coordinator import BuildResult, build
from data_pipeline.preprocess.unit_record import UnitRecord
from data_pipeline.preprocess.workspace import Output
from data_pipeline.tokenizer.config import TrainBPE
from data_pipeline.tokenizer.training import train_bpe
from pretrain.core.errors import DataError
from tests.support.source_reading import write

LINE = '{"text": "some words of text"}\n'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train_bpe(["some words"], TrainBPE(vocab_size=258)).content)
    return {"kind": "file", "path": str(path)}


def build_of(
    folder: Path, tokenizer: dict[str, str], sources: dict[str, str], **fields: Any
) -> BuildResult:
    named = {name: {"kind": "jsonl", "input": [path]} for name, path in sources.items()}
    config = DataConfig.model_validate(
        {"sources": named, "tokenizer": tokenizer, "validation_share": 0.0, **fields}
    )
    return build(config, Output(folder / "data"), workers=1)


def lines(good: int, bad: int, of: str = "no json\n") -> str:
    return LINE * (good // 2) + of * bad + LINE * (good - good // 2)


def test_a_twentieth_of_a_source_may_be_bad_and_no_more(
    tmp_path: Path, tokenizer: dict[str, str]
) -> None:
    few = write(tmp_path / "few.jsonl", lines(95, 5))
    assert build_of(tmp_path / "1", tokenizer, {"few": few}).manifest.sources["few"].bad == {
        "invalid_json": 5
    }
    many = write(tmp_path / "many.jsonl", lines(94, 6))
    with pytest.raises(
        DataError,
        match=(
            r"source 'many': 6 of 100 records .* most often invalid_json \(6: not JSON.*many.jsonl"
            r" line 48.*--max-bad-share 0\.05"
        ),
    ) as caught:
        build_of(tmp_path / "2", tokenizer, {"many": many})
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    assert not (tmp_path / "2" / "data" / "manifest.json").exists()
    assert (
        build_of(tmp_path / "2", tokenizer, {"many": many}, max_bad_share=0.06)
        .manifest.sources["many"]
        .documents
        == 94
    )


def test_each_source_is_judged_by_itself(tmp_path: Path, tokenizer: dict[str, str]) -> None:
    sources = {
        "large": write(tmp_path / "a.jsonl", lines(2000, 0)),
        "small": write(tmp_path / "b.jsonl", lines(90, 10)),
    }
    with pytest.raises(DataError, match="source 'small': 10 of 100 records"):
        build_of(tmp_path, tokenizer, sources)


@pytest.mark.parametrize(
    ("content", "share", "passes"),
    [(lines(4, 1), 0.05, True), (lines(4, 2), 0.05, False), (lines(4, 1), 0.0, False)],
)
def test_one_bad_record_of_a_few_stops_nothing_unless_none_is_allowed(
    tmp_path: Path, tokenizer: dict[str, str], content: str, share: float, passes: bool
) -> None:
    path = write(tmp_path / "a.jsonl", content)
    if passes:
        assert (
            build_of(tmp_path, tokenizer, {"all": path}, max_bad_share=share)
            .manifest.sources["all"]
            .documents
            == 4
        )
        return
    with pytest.raises(DataError, match="source 'all': "):
        build_of(tmp_path, tokenizer, {"all": path}, max_bad_share=share)


def test_texts_of_white_space_are_no_loss(tmp_path: Path, tokenizer: dict[str, str]) -> None:
    path = write(tmp_path / "a.jsonl", lines(60, 40, '{"text": " "}\n'))
    assert build_of(tmp_path, tokenizer, {"all": path}).manifest.sources["all"].bad == {"empty": 40}


def test_the_lost_rest_of_a_damaged_file_counts_by_its_bytes(
    tmp_path: Path, tokenizer: dict[str, str]
) -> None:
    rows = "".join(
        json.dumps({"text": f"number {number} {number**7:x} {number**9:x}"}) + "\n"
        for number in range(5_000)
    )
    content = bytearray(lzma.compress(rows.encode()))
    at = len(content) // 2
    content[at : at + 40] = bytes(40)
    path = write(tmp_path / "a.jsonl.xz", bytes(content))
    with pytest.raises(
        DataError, match=r"\d of [\d,]+ records are bad, with (4\d|50)\.\d% of its bytes"
    ):
        build_of(tmp_path, tokenizer, {"all": path})
    found = build_of(tmp_path, tokenizer, {"all": path}, max_bad_share=0.6).manifest.sources["all"]
    assert found.bad["damaged_compression"] == 1 and 2_000 < found.documents < 3_000
    # The same loss beside twenty times as much is small.
    other = write(tmp_path / "b.jsonl", rows * 20)
    named = {"all": {"kind": "jsonl", "input": [path, other]}}
    config = DataConfig.model_validate(
        {"sources": named, "tokenizer": tokenizer, "validation_share": 0.0}
    )
    assert (
        build(config, Output(tmp_path / "both"), workers=1).manifest.sources["all"].bad == found.bad
    )


def test_one_long_record_counts_by_its_bytes(tmp_path: Path, tokenizer: dict[str, str]) -> None:
    for unit_bytes in (50_000, 1 << 20):
        path = write(
            tmp_path / "a.jsonl",
            LINE * 3000 + json.dumps({"text": "x" * 300_000}) + "\n" + LINE * 3000,
        )
        with pytest.raises(
            DataError,
            match=r"1 of [36],001 records are bad, with 6\d\.\d% of its bytes; most often too_long",
        ):
            build_of(
                tmp_path, tokenizer, {"all": path}, max_record_bytes=100_000, unit_bytes=unit_bytes
            )


def test_a_file_that_is_not_text_counts_by_its_bytes(
    tmp_path: Path, tokenizer: dict[str, str]
) -> None:
    for number in range(40):
        write(tmp_path / "raw" / f"{number}.txt", f"text {number}\n")
    write(tmp_path / "raw" / "latin.txt", b"K\xe4se " * 20_000)
    config = DataConfig.model_validate(
        {"source": {"kind": "text", "input": [f"{tmp_path}/raw/*.txt"]}, "tokenizer": tokenizer}
    )
    with pytest.raises(
        DataError, match=r"1 of 41 records .* 9\d\.\d% .* invalid_utf8 .*--encoding, such as cp1252"
    ):
        build(config, Output(tmp_path / "data"), workers=1)


def test_half_a_table_that_cannot_be_read_is_more_than_one_bad_record(
    tmp_path: Path, tokenizer: dict[str, str]
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"text {number * 7919}" for number in range(600)]}),
        path,
        row_group_size=300,
        use_dictionary=False,
    )
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 100] = b"?" * 100
    path.write_bytes(content)
    config = DataConfig.model_validate(
        {"source": {"kind": "parquet", "input": [str(path)]}, "tokenizer": tokenizer}
    )
    with pytest.raises(
        DataError,
        match=r"1 of 301 records are bad, with [45]\d\.\d% of its bytes; most often damaged_file",
    ):
        build(config, Output(tmp_path / "data"), workers=1)
    found = build(
        config.model_copy(update={"max_bad_share": 0.6}), Output(tmp_path / "data"), workers=1
    )
    assert found.manifest.sources["all"].documents == 300


def test_sampling_stops_before_a_tokenizer_is_trained(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(50, 50))
    with pytest.raises(DataError, match="50 of 100 records"):
        build_of(tmp_path, {"kind": "train_bpe", "vocab_size": 300}, {"all": path})
    assert not list(tmp_path.glob("data/.building/trained"))


def test_what_is_held_out_of_a_stream_is_judged_too(
    tmp_path: Path, tokenizer: dict[str, str]
) -> None:
    path = write(tmp_path / "a.jsonl", lines(500, 500))
    with pytest.raises(DataError, match="source 'all': "):
        build_of(
            tmp_path,
            tokenizer,
            {"all": path},
            validation_share=0.5,
            streaming=True,
            streaming_validation_documents=400,
        )


def unit_record(source: str, records: int, bad: int, bad_bytes: int) -> UnitRecord:
    return UnitRecord(
        unit=0,
        source=source,
        lines=records,
        records=records,
        documents=records - bad,
        hashed=0,
        checksum="",
        lowest=None,
        highest=None,
        bad={"invalid_json": bad},
        left_out={},
        dropped={},
        edits={},
        notes={},
        bad_bytes=bad_bytes,
        bad_examples={},
    )


def test_what_can_not_be_made_good_any_more_stops_at_once_and_a_share_only_at_the_end() -> None:
    shares = BadShares(0.05, {"a": 1000, "b": 1000})
    shares.add(unit_record("a", 10, 8, 50))  # of ten records, but there may be many more
    with pytest.raises(DataError, match="source 'a'"):
        shares.check()
    shares.add(unit_record("b", 1000, 3, 10))
    with pytest.raises(DataError, match="source 'b': 6 of 2,000 records"):
        shares.add(unit_record("b", 1000, 3, 41))
