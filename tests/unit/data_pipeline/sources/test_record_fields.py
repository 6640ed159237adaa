"""Fields by name in every source of records: exact names, paths, kinds of text, and what is said if
the text is not there.
"""

from __future__ import annotations

import csv
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from data_pipeline.sources.records import ABSENT, find, suggestion
from pretrain.core.errors import DataError
from tests.support.source_reading import list_units, read_all, reasons, texts

Table = pa.Table
CHAT = [[{"role": "user", "content": "hello"}], [{"role": "assistant", "content": "hi"}]]


def write_jsonl(path: Path, table: Table) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


def write_csv(path: Path, table: Table) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, table.column_names)
        writer.writeheader()
        writer.writerows(table.to_pylist())


def write_stream(path: Path, table: Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_file(path: Path, table: Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_saved(path: Path, table: Table) -> None:
    pytest.importorskip("datasets").Dataset(table).save_to_disk(path)


# Each way to keep a table, and the section that reads it.
FORMS: dict[str, tuple[Callable[[Path, Table], None], str]] = {
    "jsonl": (write_jsonl, "jsonl"),
    "csv": (write_csv, "csv"),
    "parquet": (lambda path, table: pq.write_table(table, path), "parquet"),
    "stream": (write_stream, "arrow"),
    "file": (write_file, "arrow"),
    "feather": (
        lambda path, table: pyarrow.feather.write_feather(table, path, compression="lz4"),
        "arrow",
    ),
    "saved": (write_saved, "datasets"),
}
ARROW_FORMS = [form for form in FORMS if form not in ("jsonl", "csv")]
NESTED_FORMS = [form for form in FORMS if form != "csv"]


def section(tmp_path: Path, form: str, table: Table, **fields: Any) -> dict[str, Any]:
    write, kind = FORMS[form]
    path = tmp_path / f"{form}.data"
    write(path, table)
    place = {"dataset": str(path)} if kind == "datasets" else {"input": [str(path)]}
    return {"kind": kind, **place, **fields}


@pytest.mark.parametrize("form", FORMS)
def test_a_dot_in_a_columns_name_is_part_of_it(tmp_path: Path, form: str) -> None:
    table = pa.table(
        {
            "meta.text": ["one", "two"],
            "meta.id": ["a", "b"],
            "text": ["no", "no"],
            "c.d.e": ["x", "y"],
        }
    )
    asked = section(
        tmp_path, form, table, text_field="meta.text", id_field="meta.id", metadata_fields=["c.d.e"]
    )
    found = [(document.text, document.key, document.metadata) for document in read_all(asked)]
    assert found == [("one", "a", {"c.d.e": "x"}), ("two", "b", {"c.d.e": "y"})]


@pytest.mark.parametrize("form", NESTED_FORMS)
def test_an_exact_name_goes_before_a_path_and_the_longest_first_name_before_others(
    tmp_path: Path, form: str
) -> None:
    inner = [{"b": "path", "b.c": "short", "x": {"y": "deep"}, "n": 7}]
    table = pa.table({"a": inner, "a.b": [{"c": "long"}], "a.x.y": ["exact"]})
    for name, expected in {"a.b.c": "long", "a.x.y": "exact", "a.b": None}.items():
        asked = section(tmp_path, form, table, text_field=name, id_field="a.n")
        if expected is None:
            with pytest.raises(
                DataError, match="'a.b' is an object with c|holds struct.*--text-field a.b.c"
            ):
                list_units(asked)
        else:
            assert [(document.text, document.key) for document in read_all(asked)] == [
                (expected, "7")
            ]


def random_object(source: random.Random, depth: int) -> dict[str, Any]:
    names = source.sample(["a", "b", "c", "a.b", "b.c", "a.b.c"], source.randint(1, 4))
    return {
        name: (
            random_object(source, depth - 1)
            if depth and source.random() < 0.5
            else f"text {source.random()}"
        )
        for name in names
    }


def leaves(record: dict[str, Any], before: str = "") -> dict[str, list[str]]:
    """Every text of a record under each name that could mean it."""
    found: dict[str, list[str]] = {}
    for name, value in record.items():
        inner = (
            leaves(value, f"{before}{name}.")
            if isinstance(value, dict)
            else {f"{before}{name}": [value]}
        )
        for path, values in inner.items():
            found.setdefault(path, []).extend(values)
    return found


def object_names(record: dict[str, Any], before: str = "") -> set[str]:
    inner = {f"{before}{name}": value for name, value in record.items() if isinstance(value, dict)}
    return set(inner).union(*(object_names(value, f"{name}.") for name, value in inner.items()))


def test_random_records_give_the_same_text_in_json_and_parquet_and_what_pandas_finds_if_there_is_one_only(
    tmp_path: Path,
) -> None:
    source = random.Random(4)
    ambiguous = alone = 0
    for number in range(50):
        record = random_object(source, 2)
        table = pa.Table.from_pylist([record])
        forms = {form: section(tmp_path, form, table) for form in ("jsonl", "parquet", "stream")}
        flat = pandas.json_normalize([record]).iloc[0]
        objects = object_names(record)
        for name, values in leaves(record).items():
            found = {
                form: (
                    texts(read_all(asked | {"text_field": name})) if readable(asked, name) else None
                )
                for form, asked in forms.items()
            }
            assert found["jsonl"] == found["parquet"] == found["stream"], (
                number,
                record,
                name,
                found,
            )
            if len(values) == 1 and name not in objects:
                alone += 1
                assert found["jsonl"] == [flat[name]] == values, (record, name)
            else:
                ambiguous += 1
                assert found["jsonl"] is None or found["jsonl"][0] in values
        assert find(record, "a.c.d.e") is ABSENT
    assert ambiguous > 10 and alone > 100


def readable(asked: dict[str, Any], name: str) -> bool:
    """An exact name may be that of an object, which hides the text behind a path."""
    try:
        list_units(asked | {"text_field": name})
    except DataError as error:
        assert "an object with" in str(error) or "holds struct" in str(error)
        return False
    return True


WORDS = ["é", None, "long" * 10, "", "é", "a\tb\n"]
KINDS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of bytes": pa.dictionary(pa.int8(), pa.binary()),
}


@pytest.mark.parametrize("form", [form for form in ARROW_FORMS if form != "saved"])
@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_text_column_is_read(
    tmp_path: Path, form: str, kind: str, is_nested: bool
) -> None:
    if "dictionary" in kind:
        values = pa.array(WORDS, pa.binary() if "bytes" in kind else pa.string())
        column: pa.Array = values.dictionary_encode().cast(KINDS[kind])
    else:
        column = pa.array(WORDS).cast(KINDS[kind])
    if is_nested:
        column = pa.StructArray.from_arrays([column], ["text"], mask=pa.array([False] * 5 + [True]))
    table = pa.table({"doc" if is_nested else "text": column})
    results = read_all(
        section(tmp_path, form, table, text_field="doc.text" if is_nested else "text"),
        max_record_bytes=20,
    )
    assert texts(results) == (["é", "é"] if is_nested else ["é", "é", "a\tb\n"])
    assert reasons(results) == ["missing_field", "too_long", "empty"] + (
        ["missing_field"] if is_nested else []
    )


@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.string()])
def test_bytes_that_are_not_utf8_are_left_out_by_row(
    tmp_path: Path, form: str, kind: pa.DataType
) -> None:
    column = pa.array([b"ok", b"\xff", b"a\0b", "é".encode()], pa.binary())
    table = pa.table(
        {
            "text": column.view(kind) if kind == pa.string() else column.cast(kind),
            "id": pa.array([b"1", b"2", b"3", b"4"]),
        }
    )
    results = read_all(section(tmp_path, form, table, id_field="id"))
    assert texts(results) == ["ok", "é"] and reasons(results) == ["invalid_utf8", "nul"]
    assert [result.key for result in results if hasattr(result, "key")] == ["1", "4"]


def test_columns_of_nulls_extension_types_and_views_are_read_or_counted(tmp_path: Path) -> None:
    table = pa.table({"text": pa.nulls(3)})
    for form in ("parquet", "stream", "saved"):
        assert reasons(read_all(section(tmp_path, form, table))) == ["missing_field"] * 3
    json_column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', None]))
    for form in ("stream", "file", "parquet"):
        assert texts(read_all(section(tmp_path, form, pa.table({"text": json_column})))) == [
            '{"a": 1}'
        ]


@pytest.mark.parametrize("form", NESTED_FORMS)
def test_lists_chats_numbers_and_objects_are_refused_with_their_kind(
    tmp_path: Path, form: str
) -> None:
    table = pa.table(
        {
            "messages": CHAT,
            "parts": [["a", "b"], ["c"]],
            "n": [1, 2],
            "doc": [{"body": "x", "k": 1}, {"body": "y", "k": 2}],
        }
    )
    expected = {
        "messages": (
            "a list, its first entry an object with role, content",
            r"holds list<.*struct<.*role.*> *>?.*render each chat into one text",
        ),
        "parts": ("a list of texts", "holds list<.*string>.*join each row's parts into one text"),
        "n": ("'n' is a number", "holds int64, not text"),
        "doc": ("an object with body, k", "holds struct<.*--text-field doc.body"),
    }
    for name, (in_json, in_arrow) in expected.items():
        with pytest.raises(DataError, match=in_json if form == "jsonl" else in_arrow) as refusal:
            list_units(section(tmp_path, form, table, text_field=name))
        assert "\n" not in str(refusal.value) and "--text-field" in str(refusal.value)


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_field_names_those_that_exist_and_suggests_one(tmp_path: Path, form: str) -> None:
    columns = {
        "url": ["u", "v"],
        "raw_content": ["one", "two"],
        "Text": ["three", "four"],
        **{f"c{n}": ["x", "y"] for n in range(20)},
    }
    with pytest.raises(DataError, match="url, raw_content, Text, .* and 11 more") as refusal:
        list_units(section(tmp_path, form, pa.table(columns)))
    assert "Text" in str(refusal.value).rpartition("perhaps")[2] and refusal.value.exit_code == 3
    del columns["Text"]
    with pytest.raises(DataError) as refusal:
        list_units(section(tmp_path, form, pa.table(columns)))
    assert "raw_content" in str(refusal.value).rpartition("perhaps")[2]


@pytest.mark.parametrize("form", NESTED_FORMS)
def test_a_missing_field_inside_another_is_suggested_with_its_path(
    tmp_path: Path, form: str
) -> None:
    table = pa.table({"doc": [{"content": "one", "lang": "en"}], "n": [3]})
    with pytest.raises(DataError, match=r"doc, .*doc\.content, doc\.lang") as refusal:
        list_units(section(tmp_path, form, table))
    assert "doc.content" in str(refusal.value).rpartition("perhaps")[2]


def test_suggestions_are_close_names_then_usual_ones_and_none_otherwise() -> None:
    assert suggestion("text", ["body", "texts"]) == "texts"
    assert suggestion("text", ["meta.content", "body"]) == "body"
    assert suggestion("text", ["url", "id"]) is None


def test_only_the_first_file_decides_and_only_if_no_record_of_it_has_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"other": "x"}\n' * 500 + '{"text": "late"}\n')
    (tmp_path / "b.jsonl").write_text('{"other": "x"}\n')
    results = read_all({"kind": "jsonl", "input": [str(tmp_path / "*.jsonl")]}, 100)
    assert texts(results) == ["late"] and reasons(results) == ["missing_field"] * 501
    for first in ('{"text": null}\n', '{"text": ""}\n', "{broken\n"):
        (tmp_path / "a.jsonl").write_text(first)
        assert texts(read_all({"kind": "jsonl", "input": [str(tmp_path / "*.jsonl")]})) == []
    (tmp_path / "a.jsonl").write_text("{broken\n" + '{"other": "x"}\n' * 500)
    with pytest.raises(DataError, match="no record of .*a.jsonl has a text there"):
        list_units({"kind": "jsonl", "input": [str(tmp_path / "*.jsonl")]}, 100)


def test_parquet_files_of_different_schemas_are_read_and_one_without_the_column_is_named_at_the_start(
    tmp_path: Path,
) -> None:
    tables = {
        "a": pa.table({"text": ["one"], "n": [1]}),
        "b": pa.table({"n": ["x"], "text": pa.array(["two"], pa.large_string())}),
        "c": pa.table({"text": pa.array(["three"]).dictionary_encode(), "z": [None]}),
        "d": pa.table({"text": pa.nulls(1)}),
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    results = read_all({"kind": "parquet", "input": [str(tmp_path)]})
    assert texts(results) == ["one", "two", "three"] and reasons(results) == ["missing_field"]
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "bb.parquet")
    with pytest.raises(
        DataError,
        match=r"bb.parquet has no column 'text' \(it has content\).*--text-field, perhaps content",
    ):
        list_units({"kind": "parquet", "input": [str(tmp_path)]})
    pq.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), tmp_path / "bb.parquet")
    with pytest.raises(DataError, match="bb.parquet has two columns 'text'"):
        list_units({"kind": "parquet", "input": [str(tmp_path)]})


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("datasets").setLevel(logging.ERROR)
