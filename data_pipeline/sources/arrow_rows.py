"""Rows of Arrow tables as records: columns by name, kinds of text, one row at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from data_pipeline.sources.config import RecordsBase
from data_pipeline.sources.files import one_line
from data_pipeline.sources.interface import Document, LeftOut
from data_pipeline.sources.records import NAME_DEPTH, RecordReader, listed, suggestion
from pretrain.core.errors import DataError
from pretrain.core.files import JsonObject

if TYPE_CHECKING:
    import pyarrow

# Rows that are decoded together: few enough that long texts fit into memory.
BATCH_ROWS = 256


class Row(NamedTuple):
    """One row. ``record`` holds the columns of the id and the metadata only."""

    number: int
    text: str | None
    record: JsonObject


def columns_of(config: RecordsBase) -> list[str]:
    """The columns that a section asks for, dotted if they are inside others."""
    return list(dict.fromkeys([config.text_field, *_other_columns(config)]))


def top_columns(schema: pyarrow.Schema, config: RecordsBase) -> list[str]:
    """The columns of the table itself that hold what a section asks for.

    ``check_columns`` passed.
    """
    return list(dict.fromkeys(_path_of(list(schema), name)[0] for name in columns_of(config)))


def _other_columns(config: RecordsBase) -> list[str]:
    return [*([config.id_field] if config.id_field else []), *config.metadata_fields]


def _path_of(fields: list[pyarrow.Field], name: str) -> list[str]:
    """Return the names of the columns from the outermost in, by the rule of :class:`RecordReader`.

    It is empty if there is no such column.

    Raises:
        LookupError: if two columns have the name.
    """
    import pyarrow

    names = [field.name for field in fields]
    if name in names:
        if names.count(name) > 1:
            raise LookupError(name)
        return [name]
    cut = name.rfind(".")
    while cut > 0:
        head = name[:cut]
        if head in names and names.count(head) == 1:
            kind = _storage(fields[names.index(head)].type)
            inner = _path_of(list(kind), name[cut + 1 :]) if pyarrow.types.is_struct(kind) else []
            if inner:
                return [head, *inner]
        cut = name.rfind(".", 0, cut)
    return []


def _storage(kind: pyarrow.DataType) -> pyarrow.DataType:
    import pyarrow

    return kind.storage_type if isinstance(kind, pyarrow.BaseExtensionType) else kind


def check_columns(schema: pyarrow.Schema, config: RecordsBase, place: str) -> None:
    """Check that a table has the wanted columns.

    Raises:
        DataError: for a column that is missing or there twice, or a text column without texts.
    """
    for name in columns_of(config):
        try:
            path = _path_of(list(schema), name)
        except LookupError:
            raise DataError(f"{place} has two columns '{name}': rename one of them") from None
        names = _names(list(schema))
        texts = [column for column, kind in names.items() if _is_text(kind)]
        if not path:
            option = "--text-field" if name == config.text_field else "id_field or metadata_fields"
            probable = suggestion(name, texts if name == config.text_field else list(names))
            advice = f"{option}, perhaps {one_line(probable)}" if probable else option
            raise DataError(
                f"{place} has no column '{name}' (it has {listed(names)}): name another with"
                f" {advice}"
            )
        if name == config.text_field:
            kind = _kind_at(schema, path)
            if not _is_text(kind):
                held = f"column '{name}' of {place} holds {one_line(str(kind))}, not text"
                raise DataError(f"{held} (its columns are {listed(names)}): {_advice(kind, name)}")


def _kind_at(schema: pyarrow.Schema, path: list[str]) -> pyarrow.DataType:
    field = schema.field(path[0])
    for name in path[1:]:
        field = _storage(field.type).field(name)
    return _storage(field.type)


def _names(fields: list[pyarrow.Field]) -> dict[str, pyarrow.DataType]:
    """Kinds of columns by name, the outer ones first, those inside others as a.b."""
    import pyarrow

    found: dict[str, pyarrow.DataType] = {}
    level = [("", field) for field in fields]
    for _ in range(NAME_DEPTH):
        found |= {f"{prefix}{field.name}": _storage(field.type) for prefix, field in level}
        structs = [(f"{prefix}{field.name}.", _storage(field.type)) for prefix, field in level]
        level = [
            (prefix, inner)
            for prefix, kind in structs
            if pyarrow.types.is_struct(kind)
            for inner in kind
        ]
    return found


def _is_text(kind: pyarrow.DataType) -> bool:
    """Text in UTF-8, which some writers keep as plain bytes."""
    from pyarrow import types

    kind = _storage(kind.value_type if types.is_dictionary(kind) else kind)
    is_string = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return (
        is_string
        or types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_null(kind)
    )


def _advice(kind: pyarrow.DataType, name: str) -> str:
    from pyarrow import types

    if types.is_struct(kind):
        texts = [inner for inner, inner_kind in _names(list(kind)).items() if _is_text(inner_kind)]
        return (
            f"name a text inside it, such as --text-field {name}.{texts[0]}"
            if texts
            else "name another with --text-field"
        )
    lists = (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )
    if any(is_list(kind) for is_list in lists):
        if types.is_struct(_storage(kind.value_type)):
            return (
                "render each chat into one text first, as with the tokenizer's chat template, or"
                " name another with --text-field"
            )
        return "join each row's parts into one text first, or name another with --text-field"
    return "name another with --text-field"


def rows_of(
    batch: pyarrow.RecordBatch, config: RecordsBase, name: str, first: int, longest: int
) -> Iterator[Row | LeftOut]:
    """Yield the rows of a batch, one at a time.

    A text of more than ``longest`` bytes never becomes a Python object.

    Args:
        first: number of the batch's first row in its file or data set.
    """
    texts = _as_text(column_at(batch, config.text_field))
    others = dict.fromkeys(
        _path_of(list(batch.schema), column)[0] for column in _other_columns(config)
    )
    columns = [(column_name, batch.column(column_name)) for column_name in others]
    # Writers that keep text as bytes do so with names too.
    columns = [
        (name_, _as_text(column) if name_ == config.id_field and _is_text(column.type) else column)
        for name_, column in columns
    ]
    for index, length in enumerate(_lengths(texts).to_pylist()):
        number = first + index
        if length is not None and length > longest:
            yield LeftOut(
                name,
                "too_long",
                detail=f"row {number}: {length} bytes, the limit is {longest}",
                size=length,
            )
            continue
        try:
            row = Row(
                number,
                texts[index].as_py(),
                {column_name: column[index].as_py() for column_name, column in columns},
            )
        except UnicodeDecodeError as error:
            yield LeftOut(name, "invalid_utf8", detail=f"row {number}: at byte {error.start}")
        except (ValueError, OverflowError) as error:
            # For example, a date that Python cannot hold.
            yield LeftOut(name, "undecodable", detail=f"row {number}: {one_line(str(error))}")
        else:
            yield row


def column_at(table: pyarrow.RecordBatch | pyarrow.Table, name: str) -> pyarrow.Array:
    """A column, or one inside others, of a table whose columns were checked."""
    import pyarrow
    import pyarrow.compute

    top, *inner = _path_of(list(table.schema), name)
    column = table.column(top)
    if isinstance(column, pyarrow.ChunkedArray):
        column = column.combine_chunks()
    for part in inner:
        column = pyarrow.compute.struct_field(_unwrapped(column), part)
    return _unwrapped(column)


def _unwrapped(column: pyarrow.Array) -> pyarrow.Array:
    import pyarrow

    return column.storage if isinstance(column, pyarrow.ExtensionArray) else column


def _as_text(column: pyarrow.Array) -> pyarrow.Array:
    """Return the column as strings whose bytes are not checked yet.

    Reading one that is not UTF-8 raises UnicodeDecodeError.
    """
    import pyarrow
    from pyarrow import types

    column = _unwrapped(column)
    kind = column.type
    # A dictionary is kept as it is: a long text that many rows share is held once.
    if types.is_dictionary(kind):
        return pyarrow.DictionaryArray.from_arrays(column.indices, _as_text(column.dictionary))
    if types.is_null(kind):
        return column.cast(pyarrow.string())
    if types.is_string_view(kind) or types.is_binary_view(kind):
        column = column.cast(pyarrow.large_binary())
        kind = column.type
    if types.is_binary(kind):
        return column.view(pyarrow.string())
    return column.view(pyarrow.large_string()) if types.is_large_binary(kind) else column


def _lengths(texts: pyarrow.Array) -> pyarrow.Array:
    import pyarrow
    import pyarrow.compute

    if pyarrow.types.is_dictionary(texts.type):
        return pyarrow.compute.take(_lengths(texts.dictionary), texts.indices)
    return pyarrow.compute.binary_length(texts)


def document_of(to_document: RecordReader, row: Row, name: str) -> Document | LeftOut:
    """Return the document of a row of ``name``, or why there is none."""
    result = to_document.document(row.text, row.record, f"{name}:{row.number}")
    return (
        result
        if isinstance(result, Document)
        else LeftOut(name, result[0], detail=f"row {row.number}: {result[1]}".rstrip(": "))
    )
