"""Arrow files and streams: batches, damage anywhere, and streams that stop."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from data_pipeline.sources.guess import sources_of
from data_pipeline.sources.interface import Document
from pretrain.core.errors import DataError, PipelineError
from tests.support.source_reading import left_out, list_units, read_all, read_units, texts


def section(path: Path, **fields: object) -> dict[str, object]:
    return {"kind": "arrow", "input": [str(path)], **fields}


def write_arrow(path: Path, rows: int, batch_rows: int, is_stream: bool) -> list[str]:
    values = [f"text number {number} " + "word " * (number % 7) for number in range(rows)]
    table = pa.table({"n": list(range(rows)), "text": values})
    make = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return values


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("batch_rows", [1, 300, 5000])
def test_batches_of_any_size_are_read_in_order_with_row_numbers(
    tmp_path: Path, is_stream: bool, batch_rows: int
) -> None:
    path = tmp_path / "a.arrow"
    values = write_arrow(path, 1000, batch_rows, is_stream)
    expected = [Document(value, str(row), str(row)) for row, value in enumerate(values)]
    assert read_all(section(path, id_field="n")) == expected
    assert [document.id for document in read_all(section(path))] == [
        f"{path}:{row}" for row in range(1000)
    ]


def test_patterns_of_files_and_streams_are_arrow_by_name(tmp_path: Path) -> None:
    values = write_arrow(tmp_path / "a.arrow", 3, 2, True) + write_arrow(
        tmp_path / "b.arrow", 3, 2, False
    )
    pyarrow.feather.write_feather(
        pa.table({"text": ["feather"]}), tmp_path / "c.feather", compression="zstd"
    )
    sections = sources_of([str(tmp_path / "*.arrow"), str(tmp_path / "c.feather")], None)
    assert list(sections) == ["arrow"] and texts(read_all(sections["arrow"])) == [
        *values,
        "feather",
    ]


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_file_cut_anywhere_gives_the_first_rows_and_says_so_or_is_refused(
    tmp_path: Path, is_stream: bool
) -> None:
    path, source = tmp_path / "a.arrow", random.Random(1)
    values = write_arrow(path, 60, 20, is_stream)
    content, outcomes = path.read_bytes(), {"said": 0, "refused": 0}
    for size in sorted({0, 7, len(content) - 1, *source.sample(range(len(content)), 150)}):
        path.write_bytes(content[:size])
        try:
            results = read_all(section(path))
        except DataError as error:
            assert (
                "is no Arrow file or stream, or is cut short" in str(error) and error.exit_code == 3
            )
            outcomes["refused"] += 1
            continue
        found = texts(results)
        assert found == values[: len(found)]
        # Without the last bytes of the marker nothing is missing.
        assert [bad.reason for bad in left_out(results)] == ["damaged_file"] or len(found) == 60, (
            size
        )
        outcomes["said"] += 1
    assert outcomes["refused"] > 10 and (outcomes["said"] > 20) == is_stream, outcomes


def test_a_stream_that_stops_between_two_batches_says_that_rows_may_be_missing(
    tmp_path: Path,
) -> None:
    path, ends = tmp_path / "a.arrow", []
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, pa.schema({"text": pa.string()})) as writer,
    ):
        for number in range(4):
            writer.write_batch(pa.record_batch({"text": [f"row {number}"]}))
            ends.append(sink.tell())
    content = path.read_bytes()
    for count, end in enumerate(ends, 1):
        path.write_bytes(content[:end])
        results = read_all(section(path))
        assert texts(results) == [f"row {number}" for number in range(count)]
        (bad,) = left_out(results)
        assert (
            bad.reason == "damaged_file"
            and f"stops after row {count - 1} without its end marker" in bad.detail
        )
    path.write_bytes(content)
    assert left_out(read_all(section(path))) == []


@pytest.mark.parametrize("is_stream", [True, False])
def test_all_bytes_behind_the_damage_count_as_lost(tmp_path: Path, is_stream: bool) -> None:
    path, starts = tmp_path / "a.arrow", []
    make = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, make(sink, pa.schema({"text": pa.string()})) as writer:
        for number in range(10):
            starts.append(sink.tell())
            writer.write_batch(pa.record_batch({"text": [f"row {number} " + "word " * 200] * 30}))
    content = bytearray(path.read_bytes())
    content[starts[3] : starts[3] + 64] = b"?" * 64
    path.write_bytes(content)
    results = read_all(section(path))
    (bad,) = left_out(results)
    assert len(texts(results)) == 90 and bad.reason == "damaged_file"
    assert bad.size == pytest.approx(0.7 * len(content), rel=0.02)


@pytest.mark.parametrize("is_stream", [True, False])
def test_changed_bytes_give_documents_reasons_or_one_sentence(
    tmp_path: Path, is_stream: bool
) -> None:
    path, source = tmp_path / "a.arrow", random.Random(3)
    write_arrow(path, 60, 20, is_stream)
    original = path.read_bytes()
    outcomes = {"read": 0, "left out": 0, "error": 0}
    for _ in range(500):
        content = bytearray(original)
        for _ in range(source.randint(1, 4)):
            content[source.randrange(len(content))] = source.randrange(256)
        path.write_bytes(content)
        try:
            outcomes["left out" if left_out(read_all(section(path))) else "read"] += 1
        except PipelineError:
            outcomes["error"] += 1
    assert all(count > 10 for count in outcomes.values()), outcomes


def test_what_is_no_arrow_file_or_lacks_the_column_is_refused_before_any_work(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.arrow"
    pq.write_table(pa.table({"text": ["x"]}), path)
    for content in (path.read_bytes(), b"FEA1" + bytes(40), b"text", b"", b"ARROW1"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.arrow is no Arrow file or stream"):
            list_units(section(path))
    write_arrow(path, 3, 2, True)
    with pytest.raises(DataError, match=r"has no column 'body' \(it has n, text\)"):
        list_units(section(path, text_field="body"))
    units = list_units(section(path))
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        read_units(section(path), units)
