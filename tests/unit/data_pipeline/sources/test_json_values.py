"""JSON that is not one object a line: what json.loads finds in a file is found, in flat memory, and
damage costs the fewest records.
"""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.sources.json_values import ValueReader
from pretrain.core.errors import DataError
from tests.support.source_reading import left_out, list_units, read_all, reasons, texts, write

RECORDS: list[dict[str, Any]] = [
    {"text": f"text {number}", "meta": {"of": [number, {"x": "}, {"}]}} for number in range(4)
]
TEXTS = [record["text"] for record in RECORDS]


def jsonl(path: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "jsonl", "input": [path], **fields}


def read(tmp_path: Path, content: str | bytes) -> tuple[list[str], list[tuple[str, int | None]]]:
    results = read_all(jsonl(write(tmp_path / "a.json", content)), 16)
    return texts(results), [(bad.reason, bad.line) for bad in left_out(results)]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2),
        "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
        "["
        + json.dumps(RECORDS[0])
        + ","
        + json.dumps(RECORDS[1])
        + ",\n"
        + ", ".join(map(json.dumps, RECORDS[2:]))
        + "]",
        "\ufeff \n" + json.dumps(RECORDS, indent=1),
        "\n".join(json.dumps(record, indent=4) for record in RECORDS),
        "".join(map(json.dumps, RECORDS)),
        json.dumps(RECORDS[0])
        + json.dumps(RECORDS[1])
        + "\n"
        + json.dumps(RECORDS[2])
        + " "
        + json.dumps(RECORDS[3]),
        ",\n".join(map(json.dumps, RECORDS)) + ",\n",
        "\r".join(map(json.dumps, RECORDS)),
        json.dumps(RECORDS[:2]) + "\n" + json.dumps(RECORDS[2:]),
    ],
)
def test_every_layout_gives_every_record(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content) == (TEXTS, [])
    assert (
        texts(read_all(jsonl(write(tmp_path / "a.jsonl", gzip.compress(content.encode())))))
        == TEXTS
    )


def test_one_pretty_object_an_empty_array_and_arrays_in_arrays(tmp_path: Path) -> None:
    assert read(tmp_path, json.dumps(RECORDS[0], indent=2)) == (TEXTS[:1], [])
    assert read(tmp_path, "[ ]\n") == ([], [])
    assert read(tmp_path, json.dumps([RECORDS, RECORDS])) == ([], [("not_an_object", 1)] * 2)


def test_an_object_around_the_records_is_refused_with_the_name_of_its_list(tmp_path: Path) -> None:
    for indent in (None, 2):
        with pytest.raises(DataError, match=r"a\.json is one object, which holds a list in 'data'"):
            read(tmp_path, json.dumps({"version": 1, "data": RECORDS}, indent=indent))
    # A record of many that has a list and no text is a bad one, the last of a range too.
    path = write(
        tmp_path / "a.jsonl", (json.dumps(RECORDS[0]) + "\n") * 9 + json.dumps({"data": RECORDS})
    )
    assert reasons(read_all(jsonl(path), len(json.dumps(RECORDS[0])) + 1)) == ["missing_field"]
    assert read(tmp_path, json.dumps({"data": RECORDS}) + "\n" + json.dumps(RECORDS[0])) == (
        TEXTS[:1],
        [("missing_field", 1)],
    )


@pytest.mark.parametrize("indent", [None, 2])
def test_of_a_cut_array_what_is_whole_is_kept(tmp_path: Path, indent: int | None) -> None:
    content = json.dumps(RECORDS, indent=indent)
    for cut in range(1, len(content)):
        found, bad = read(tmp_path, content[:cut])
        decoder, at, whole = json.JSONDecoder(), 1, []
        while True:
            try:
                record, at = decoder.raw_decode(
                    content[:cut], at + len(content[at:cut]) - len(content[at:cut].lstrip(" ,\n"))
                )
            except ValueError:
                break
            whole.append(record["text"])
        # Inside the cut record a text looks like the border between two.
        assert found == whole and [reason for reason, _ in bad] in (
            ["invalid_json"],
            ["invalid_json"] * 2,
        )


BAD_ELEMENTS = ['{"text": "x" "y"}', '{"text": "x}', '{"text": "x"', '{"text": x}', "x"]


@pytest.mark.parametrize("bad", [*BAD_ELEMENTS, "// a comment, with [ and {"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_bad_element_costs_no_other(tmp_path: Path, indent: int | None, bad: str) -> None:
    elements = [json.dumps(record, indent=indent) for record in RECORDS]
    elements.insert(2, bad)
    found, left = read(tmp_path, "[\n" + "\n,\n".join(elements) + "\n]")
    assert found == TEXTS and [reason for reason, _ in left] == ["invalid_json"]


@pytest.mark.parametrize("bad", BAD_ELEMENTS)
def test_a_bad_element_among_others_on_a_line_costs_at_most_the_next_one(
    tmp_path: Path, bad: str
) -> None:
    elements = [json.dumps({"text": text, "more": {"of": [1, 2]}}) for text in TEXTS]
    elements.insert(2, bad)
    found, left = read(tmp_path, "[" + ", ".join(elements) + "]")
    assert found in (TEXTS, [*TEXTS[:2], *TEXTS[3:]]) and [reason for reason, _ in left] == [
        "invalid_json"
    ]


def test_comments_are_counted_line_by_line(tmp_path: Path) -> None:
    assert read(tmp_path, "// one\n# two\n" + "\n".join(map(json.dumps, RECORDS))) == (
        TEXTS,
        [("invalid_json", 1), ("invalid_json", 2)],
    )


def test_a_large_file_of_lines_is_read_in_ranges_and_any_other_as_one(tmp_path: Path) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS * 20)
    assert len(list_units(jsonl(write(tmp_path / "a.jsonl", lines)), 100)) > 10
    assert (
        len(list_units(jsonl(write(tmp_path / "a.jsonl", '{"text": "half"\n' + lines)), 100)) > 10
    )
    for content in (
        json.dumps(RECORDS * 20),
        "\n".join(json.dumps(record, indent=1) for record in RECORDS),
    ):
        assert len(list_units(jsonl(write(tmp_path / "a.json", content)), 100)) == 1


def test_an_element_that_is_too_long_is_passed_over(tmp_path: Path) -> None:
    long = [{"text": "x" * 700_000}, {"text": '"[{\n' * 200_000}, {"more": [{"a": 1}] * 90_000}]
    for indent in (None, 1):
        content = json.dumps([RECORDS[0], *long, RECORDS[1]], indent=indent)
        results = read_all(jsonl(write(tmp_path / "a.json", content)), max_record_bytes=600_000)
        assert (texts(results), reasons(results)) == (TEXTS[:2], ["too_long"] * 3)
        sizes = [len(json.dumps(value, indent=indent)) for value in long]
        assert all(
            bad.size is not None and bad.size >= size for bad, size in zip(left_out(results), sizes)
        )


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.sampled_from('a"\\{}[],:\né😀 '), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.sampled_from('b"\\{}[],'), max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


class Trickle(io.BytesIO):
    """A stream that gives a few bytes at a time."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(3)


@settings(max_examples=300, deadline=None)
@given(st.lists(JSON, max_size=5), st.sampled_from([None, 0, 2]), st.booleans(), st.booleans())
def test_elements_are_those_of_json_loads(
    values: list[Any], indent: int | None, in_array: bool, is_ascii: bool
) -> None:
    if not in_array:
        values = [value for value in values if isinstance(value, dict)]
    content = json.dumps(values, indent=indent, ensure_ascii=is_ascii)
    if not in_array:
        content = "\n".join(
            json.dumps(value, indent=indent, ensure_ascii=is_ascii) for value in values
        )
    for stream in (io.BytesIO(content.encode()), Trickle(content.encode())):
        found = list(ValueReader(stream, 1 << 20))
        assert [json.loads(value.content or b"") for value in found] == values
        for value in found:
            assert content.encode()[value.offset : value.offset + value.size] == value.content
            assert value.number == content.encode()[: value.offset].count(b"\n") + 1


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from('{}[]",:\\ \nat1'), max_size=60), st.integers(1, 30))
def test_any_bytes_come_to_an_end_and_every_byte_is_accounted_for(
    content: str, longest: int
) -> None:
    found = list(ValueReader(Trickle(content.encode()), longest))
    covered = sum(value.size for value in found)
    assert covered <= len(content) and len(content) - covered <= sum(
        content.count(sign) for sign in " \n,[]"
    )


SCRIPT = """if True:
    import sys
    from tests.support.source_reading import peak_megabytes, SECTION
    from data_pipeline.sources.interface import ReadContext, open_source
    source = open_source(SECTION.validate_python({"kind": "jsonl", "input": [sys.argv[1]]}), ReadContext("all"))
    print(sum(1 for unit in source.units(1 << 24) for _ in source.read(unit)), peak_megabytes())
"""


@pytest.mark.parametrize("megabytes", [60, pytest.param(1024, marks=pytest.mark.full)])
def test_an_array_of_any_size_is_read_in_flat_memory(tmp_path: Path, megabytes: int) -> None:
    record = json.dumps({"text": "word " * 200})
    count = (megabytes << 20) // len(record)
    with (tmp_path / "a.json").open("w") as stream:
        stream.write("[" + record)
        for _ in range(count - 1):
            stream.write(", " + record)
        stream.write("]")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "a.json")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found, peak = map(int, done.stdout.split())
    assert found == count and peak < 100
