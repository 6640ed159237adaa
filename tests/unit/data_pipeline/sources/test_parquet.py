"""Parquet files: row groups as units, few columns, flat memory, damage."""

from __future__ import annotations

import datetime
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.sources.interface import Document, LeftOut
from pretrain.core.errors import DataError, PipelineError
from tests.support.source_reading import left_out, list_units, read_all, read_units, texts


def section(path: Path, **fields: object) -> dict[str, object]:
    return {"kind": "parquet", "input": [str(path)], **fields}


def write_numbers(
    path: Path, rows: int = 1000, row_group: int = 100, **options: object
) -> list[str]:
    values = [f"text number {number} " + "word " * (number % 7) for number in range(rows)]
    pq.write_table(
        pa.table({"text": values, "other": list(range(rows))}),
        path,
        row_group_size=row_group,
        **options,
    )
    return values


def test_row_groups_are_grouped_into_units_and_rows_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = write_numbers(path)
    whole = read_all(section(path), 1 << 30)
    assert texts(whole) == values
    assert [document.id for document in whole] == [f"{path}:{row}" for row in range(1000)]
    group_bytes = pq.ParquetFile(path).metadata.row_group(1).total_byte_size
    units = list_units(section(path), group_bytes * 3)
    assert (
        [unit.start for unit in units[1:]] == [unit.end for unit in units[:-1]]
        and 2 < len(units) < 10
        and units[-1].end == 10
    )
    assert read_units(section(path), units) == whole
    assert [(unit.start, unit.end) for unit in list_units(section(path), 1)] == [
        (group, group + 1) for group in range(10)
    ]
    assert read_units(section(path), units[1:]) != whole


def test_nested_columns_ids_and_metadata(tmp_path: Path) -> None:
    rows = [
        {"doc": {"text": "one", "rest": 1.5}, "id": 3, "day": datetime.date(2020, 1, 1)},
        {"doc": None, "id": 4, "day": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    results = read_all(
        section(
            tmp_path / "a.parquet", text_field="doc.text", id_field="id", metadata_fields=["day"]
        )
    )
    assert results[0] == Document("one", "3", "3", {"day": datetime.date(2020, 1, 1)})
    assert isinstance(results[1], LeftOut) and (results[1].reason, results[1].detail) == (
        "missing_field",
        "row 1: 'doc.text' is null",
    )


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_every_kind_of_text_column_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["é", None, "long" * 10, "é"]).cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    results = read_all(section(tmp_path / "a.parquet"), max_record_bytes=20)
    assert texts(results) == ["é", "é"]
    assert [(bad.reason, bad.size) for bad in left_out(results)] == [
        ("missing_field", None),
        ("too_long", 40),
    ]


def test_columns_that_are_not_there_or_hold_no_text_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has no column 'text' \(it has body, n\)"):
        list_units(section(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"no column 'body\.text'"):
        list_units(section(tmp_path / "a.parquet", text_field="body.text"))
    with pytest.raises(DataError, match="column 'n' of .* holds int64, not text"):
        list_units(section(tmp_path / "a.parquet", text_field="n"))


def test_bad_rows_are_left_out_by_row(tmp_path: Path) -> None:
    invalid = pa.StringArray.from_buffers(
        4,
        pa.py_buffer(b"\x00\x00\x00\x00\x02\0\0\0\x03\0\0\0\x04\0\0\0\x05\0\0\0"),
        pa.py_buffer(b"ok\xff \0"),
    )
    pq.write_table(pa.table({"text": invalid}), tmp_path / "a.parquet")
    results = read_all(section(tmp_path / "a.parquet"))
    assert texts(results) == ["ok"]
    assert [(bad.reason, bad.detail[:5]) for bad in left_out(results)] == [
        ("invalid_utf8", "row 1"),
        ("empty", "row 2"),
        ("nul", "row 3"),
    ]


def test_a_page_that_cannot_be_read_loses_the_rest_of_its_row_group_only(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = write_numbers(path, write_page_checksum=True, use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(4).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 5] ^= 0x55
    path.write_bytes(content)
    results = read_all(section(path))
    assert texts(results) == values[:400] + values[500:]
    (bad,) = left_out(results)
    assert bad.reason == "damaged_file" and bad.detail.startswith("rows 400 to 499: ")
    assert bad.size == pq.ParquetFile(path).metadata.row_group(4).total_byte_size


def test_a_file_without_a_good_footer_is_an_error_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_numbers(path)
    for content in (path.read_bytes()[:-10], b"", b"PAR1", b"no parquet at all"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet is no Parquet file, or is cut short"):
            list_units(section(path))


def test_a_file_that_vanished_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_numbers(path)
    units = list_units(section(path))
    path.unlink()
    with pytest.raises(DataError, match="No such file or directory"):
        read_units(section(path), units)


def test_mutated_files_give_documents_reasons_or_one_sentence(tmp_path: Path) -> None:
    path, source = tmp_path / "a.parquet", random.Random(3)
    write_numbers(path, 60, 20)
    original = path.read_bytes()
    outcomes = {"read": 0, "left out": 0, "error": 0}
    for _ in range(600):
        content = bytearray(original)
        for _ in range(source.randint(1, 4)):
            content[source.randrange(len(content))] = source.randrange(256)
        path.write_bytes(
            content[: source.randrange(len(content))] if source.random() < 0.1 else content
        )
        try:
            outcomes["left out" if left_out(read_all(section(path))) else "read"] += 1
        except PipelineError:
            outcomes["error"] += 1
    assert all(count > 20 for count in outcomes.values()), outcomes


def test_a_large_row_group_is_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    block = os.urandom(1 << 19).hex()
    values = [block[shift:] + block[:shift] for shift in range(200)]
    pq.write_table(
        pa.table({"text": values}),
        path,
        row_group_size=1000,
        use_dictionary=False,
        compression="none",
        write_batch_size=1,
    )
    assert pq.ParquetFile(path).num_row_groups == 1 and path.stat().st_size > 200 << 20
    script = """if True:
        import sys, pyarrow.parquet, pyarrow.compute
        from tests.support.source_reading import SECTION, peak_megabytes
        from data_pipeline.sources.interface import ReadContext, open_source
        before = peak_megabytes()
        source = open_source(SECTION.validate_python({"kind": "parquet", "input": [sys.argv[1]]}), ReadContext("all"))
        count = sum(len(result.text) == 1 << 20 for unit in source.units(1 << 20) for result in source.read(unit))
        print(count, peak_megabytes() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        check=True,
        capture_output=True,
        text=True,
    )
    count, megabytes = map(int, done.stdout.split())
    assert count == 200 and megabytes < 100
