"""CSV files: quoted values, what is wrong with a record, and where."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.sources.interface import Document, ReadContext, open_source
from pretrain.core.errors import DataError
from tests.support.source_reading import SECTION, left_out, read_all, reasons, texts, write


def section(path: str, **fields: object) -> dict[str, object]:
    return {"kind": "csv", "input": [path], **fields}


def test_quoted_values_hold_delimiters_quotes_and_line_ends(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.csv", '\ufeffid,text\r\n1,"one, ""two""\r\nthree"\r\n\r\n2,plain\r\n'
    )
    assert read_all(section(path, id_field="id", metadata_fields=["id"])) == [
        Document('one, "two"\r\nthree', "1", "1", {"id": "1"}),
        Document("plain", "2", "2", {"id": "2"}),
    ]


def test_a_dot_in_a_column_name_is_a_part_of_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "doc.text\tn\nhello\t1\n")
    assert texts(read_all(section(path, text_field="doc.text", delimiter="\t"))) == ["hello"]


def test_missing_or_repeated_columns_are_named_with_those_that_exist(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "body,title,title\nx,y,z\n")
    with pytest.raises(
        DataError, match=r"a\.csv has no column 'text' \(it has body, title, title\)"
    ):
        read_all(section(path))
    with pytest.raises(DataError, match="two columns 'title'"):
        read_all(section(path, text_field="title"))


def test_bad_records_say_what_and_where_and_the_next_one_is_read(tmp_path: Path) -> None:
    content = (
        b'text,n\ngood,1\nfew\nmany,1,2\nb\xffd,1\nnul\0,1\n"multi\nline",1\na\rb,1\n ,1\n"'
        + b"long\n" * 20
        + b'",1\nlast,1\n'
    )
    path = write(tmp_path / "a.csv", content)
    results = read_all(section(path), max_record_bytes=60)
    assert texts(results) == ["good", "multi\nline", "last"]
    assert [(bad.reason, bad.line) for bad in left_out(results)] == [
        ("field_count", 3),
        ("field_count", 4),
        ("invalid_utf8", 5),
        ("nul", 6),
        ("invalid_csv", 9),
        ("empty", 10),
        ("too_long", 11),
    ]
    assert (
        left_out(results)[2].detail
        == "not utf-8 at character 1; another encoding is named with --encoding"
    )
    lines = content.split(b"\n")
    for bad in left_out(results):
        assert bad.line is not None and bad.offset is not None
        assert content[bad.offset :].startswith(lines[bad.line - 1])
    assert [
        int(document.id.rsplit(":", 1)[1]) for document in results if isinstance(document, Document)
    ] == [content.index(start) for start in (b"good", b'"multi', b"last")]


def test_a_record_that_is_too_long_ends_where_its_quotes_end(tmp_path: Path) -> None:
    # If reading continued in the middle of the long value, 'inside' would become a document.
    long = '"' + "a" * 80 + '\n""quoted"",1\ninside,1\n","more\nmore"\n'
    path = write(tmp_path / "a.csv", f"text,n\n{long}after,1\n")
    results = read_all(section(path), max_record_bytes=40)
    assert reasons(results)[0] == "too_long"
    assert texts(results)[-1] == "after"
    results = read_all(section(path), max_record_bytes=85)
    assert (reasons(results), texts(results)) == (["too_long"], ["after"])


def test_a_value_of_more_than_the_csv_modules_own_limit_is_read(tmp_path: Path) -> None:
    long = "x" * 300_000
    path = write(tmp_path / "a.csv", f"text\n{long}\n")
    assert texts(read_all(section(path))) == [long]
    assert reasons(read_all(section(path), max_record_bytes=299_999)) == ["too_long"]


def test_a_quote_that_is_never_closed_costs_its_own_line_alone(tmp_path: Path) -> None:
    results = read_all(section(write(tmp_path / "a.csv", 'text\ngood\n"open\nmore\n')))
    assert (texts(results), [(bad.reason, bad.line) for bad in left_out(results)]) == (
        ["good", "more"],
        [("invalid_csv", 3)],
    )


def test_two_stray_quotes_take_no_other_row_with_them(tmp_path: Path) -> None:
    rows = [f"{number},text of {number}" for number in range(900)]
    rows[2], rows[898] = '2,"text of 2', '898,"text of 898'
    results = read_all(section(write(tmp_path / "a.csv", "\n".join(["n,text", *rows, ""]))))
    assert [int(text.split()[-1]) for text in texts(results)] == [
        number for number in range(900) if number not in (2, 898)
    ]
    assert [(bad.reason, bad.line) for bad in left_out(results)] == [
        ("invalid_csv", 4),
        ("invalid_csv", 900),
    ]
    # Between tabs quotes are characters like others.
    path = write(tmp_path / "a.tsv", "\n".join(["n,text", *rows, ""]).replace(",", "\t"))
    assert len(texts(read_all(section(path, delimiter="\t")))) == 900
    assert len(texts(read_all(section(path, quoting=True)))) == 898


def test_a_value_over_lines_that_look_like_rows_is_noted(tmp_path: Path) -> None:
    def notes(content: str, **fields: object) -> dict[str, int]:
        source = open_source(
            SECTION.validate_python(section(write(tmp_path / "a.csv", content), **fields)),
            ReadContext("all"),
        )
        (unit,) = source.units(1 << 20)
        assert list(source.read(unit))
        return dict(source.notes)

    rows = [f"{number},text of {number}" for number in range(40)]
    rows[3], rows[30] = '3,"text of 3', '30,text of 30"'
    assert notes("\n".join(["n,text", *rows, ""])) == {"value_over_many_lines": 1}
    prose = "\n".join(f"line {number}, and more, of a text" for number in range(40))
    assert notes(f'n,text\n1,"{prose}"\n')["value_over_many_lines"] == 0
    assert notes('text\n"' + "a line\n" * 200 + '"\n') == {"value_over_many_lines": 1}


def test_delimiters_are_found_by_the_header_or_refused_with_it(tmp_path: Path) -> None:
    for delimiter in ",;\t|":
        path = write(
            tmp_path / "a.csv",
            f"\ufeff\nid{delimiter}text{delimiter}\r\n1{delimiter}one, two{delimiter}x\r\n",
        )
        expected = [] if delimiter == "," else ["one, two"]
        assert texts(read_all(section(path, id_field="id"))) == expected
    with pytest.raises(DataError, match=r"no column 'text' \(it has body, title\).*'columns'"):
        read_all(section(write(tmp_path / "a.csv", "body;title\nx;y\n")))
    with pytest.raises(DataError, match="it has id;text"):
        read_all(section(write(tmp_path / "a.csv", "id;text\nx;y\n"), delimiter=","))
    assert texts(
        read_all(section(write(tmp_path / "a.csv", "1,one\n2,two\n"), columns=["id", "text"]))
    ) == ["one", "two"]


def test_line_ends_of_every_system_and_backslash_escapes(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        assert texts(
            read_all(
                section(
                    write(tmp_path / "a.csv", end.join(["n,text", "1,one", '2,"two, too"', ""]))
                )
            )
        ) == ["one", "two, too"]
    path = write(tmp_path / "a.csv", 'n,text\n1,"say \\"hi\\", he said"\n')
    assert texts(read_all(section(path, escape="\\"))) == ['say "hi", he said']
    assert (texts(read_all(section(path))), reasons(read_all(section(path)))) == (
        [],
        ["invalid_csv"],
    )


def test_a_header_that_comes_again_is_no_document(tmp_path: Path) -> None:
    results = read_all(section(write(tmp_path / "a.csv", "n,text,,\n1,one,,\nn,text,,\n2,two,,\n")))
    assert texts(results) == ["one", "two"]
    assert [(left.reason, left.line, left.is_bad) for left in left_out(results)] == [
        ("repeated_header", 3, False)
    ]


def test_a_header_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="header line of"):
        read_all(section(write(tmp_path / "a.csv", "text" * 30 + "\nx\n")), max_record_bytes=50)
    assert read_all(section(write(tmp_path / "empty.csv", ""))) == []


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.sampled_from('a,"\n\ré '), min_size=1).filter(str.strip), max_size=6))
def test_what_the_csv_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[str]
) -> None:
    stream = io.StringIO(newline="")
    rows = csv.writer(stream)
    rows.writerows([["n", "text"], *enumerate(values)])
    path = tmp_path_factory.getbasetemp() / "written.csv"
    path.write_bytes(stream.getvalue().encode("utf-8"))
    assert texts(read_all(section(str(path)))) == values
