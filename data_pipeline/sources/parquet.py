"""Apache Parquet: a document is a row. What reads rows out of Arrow tables serves data sets too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from data_pipeline.sources.files import list_files, one_line, stamp_of, unreadable
from data_pipeline.sources.interface import Document, LeftOut, Source, Unit
from data_pipeline.sources.jsonl import RecordReader
from pretrain.config.data_schema import ParquetSource, RecordsBase
from pretrain.config.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import FileMetaData, ParquetFile

# Rows that are decoded together: few enough that long texts fit into memory, and about so many bytes where rows are known to be long.
BATCH_ROWS = 256
BATCH_BYTES = 8 << 20

Row = tuple[int, dict[str, Any]]


class RowGroup(NamedTuple):
    """``bytes`` of all its columns, before compression."""

    rows: int
    bytes: int


class Parquet(Source[ParquetSource]):
    """Row groups are read in parallel, small ones together, and only the columns that are asked for.

    A file's footer says where everything in it lies, so a file without a good one is an error before any work is done. Where a page inside
    cannot be read, the rest of its row group is left out as ``damaged_file``, and the next row group is read. Of a row group one page at a time
    is held, which writers keep at about a megabyte or a thousand rows.
    """

    def units(self, unit_bytes: int) -> list[Unit]:
        units = []
        for path in list_files(self.config.input):
            stamp = stamp_of(path)[1]
            file, groups = self._open(path)
            file.close()
            start = total = 0
            for number, group in enumerate(groups):
                if number > start and total + group.bytes > unit_bytes:
                    units.append(Unit(self.context.name, (path,), start, number, total, stamp))
                    start, total = number, 0
                total += group.bytes
            if groups:
                units.append(Unit(self.context.name, (path,), start, len(groups), total, stamp))
        return units

    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        path, to_document = unit.files[0], RecordReader(self.config)
        file, groups = self._open(path)
        row = sum(group.rows for group in groups[: unit.start])
        with file:
            for number, group in enumerate(groups[unit.start : unit.end], unit.start):
                for result in self._read_group(file, number, group, path, row):
                    yield result if isinstance(result, LeftOut) else document_of(to_document, result[1], path, result[0])
                row += group.rows

    def _read_group(self, file: ParquetFile, number: int, group: RowGroup, path: str, first: int) -> Iterator[Row | LeftOut]:
        import pyarrow

        row, problem = first, "they are not there"
        batch_rows = min(BATCH_ROWS, 1 + BATCH_BYTES * group.rows // (1 + group.bytes))
        try:
            for batch in file.iter_batches(batch_rows, row_groups=[number], columns=columns_of(self.config)):
                yield from records(batch, self.config.text_field, path, row, self.context.max_record_bytes)
                row += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise unreadable(path, error) from None
            problem = one_line(str(error))
        if row != first + group.rows:
            yield LeftOut(path, "damaged_file", detail=f"rows {row} to {first + group.rows - 1}: {problem}")

    def _open(self, path: str) -> tuple[ParquetFile, list[RowGroup]]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            # A small buffer instead of whole column chunks keeps memory flat for row groups of any size.
            file = ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
            schema, groups = file.schema_arrow, _row_groups(file.metadata)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise unreadable(path, error) from None
            raise DataError(f"{path} is no Parquet file, or is cut short ({one_line(str(error))}): fetch it again or leave it out") from None
        check_columns(schema, self.config, path)
        return file, groups


def _row_groups(metadata: FileMetaData) -> list[RowGroup]:
    # Sizes of single columns are not asked for: pyarrow ends the process where a damaged footer holds odd statistics of one.
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if any(min(group.num_rows, group.total_byte_size) < 0 for group in groups):
        raise ValueError("a row group has a negative size")
    return [RowGroup(group.num_rows, group.total_byte_size) for group in groups]


def columns_of(config: RecordsBase) -> list[str]:
    """The columns that a section asks for, dotted where they lie inside others."""
    wanted = [config.text_field, *([config.id_field] if config.id_field else []), *config.metadata_fields]
    return list(dict.fromkeys(wanted))


def check_columns(schema: pyarrow.Schema, config: RecordsBase, place: str) -> None:
    """
    Raises:
        DataError: for a column that is not there, or a text column that holds no text.
    """
    import pyarrow

    for name in columns_of(config):
        kind: Any = pyarrow.struct(list(schema))
        for part in name.split("."):
            number = kind.get_field_index(part) if pyarrow.types.is_struct(kind) else -1
            if number < 0:
                raise DataError(
                    f"{place} has no column '{name}' (it has {one_line(', '.join(schema.names))}): name others with text_field or id_field"
                )
            kind = kind.field(number).type
        if name == config.text_field and not _is_text(kind):
            raise DataError(f"column '{name}' of {place} holds {kind}, not text (its columns are {one_line(', '.join(schema.names))}): name another")


def _is_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)


def records(batch: pyarrow.RecordBatch, text_field: str, name: str, first: int, longest: int) -> Iterator[Row | LeftOut]:
    """The rows of a batch with their numbers, one at a time; a text of more than ``longest`` bytes is never made a Python object.

    Args:
        first: number of the batch's first row in its file or data set.
    """
    columns = [(column_name, batch.column(column_name)) for column_name in batch.schema.names]
    for number, length in enumerate(_text_bytes(batch, text_field), first):
        if length is not None and length > longest:
            yield LeftOut(name, "too_long", detail=f"row {number}: {length} bytes, the limit is {longest}")
            continue
        try:
            record = {column_name: column[number - first].as_py() for column_name, column in columns}
        except UnicodeDecodeError as error:
            yield LeftOut(name, "invalid_utf8", detail=f"row {number}: at byte {error.start}")
        except (ValueError, OverflowError) as error:  # a date that Python cannot hold
            yield LeftOut(name, "undecodable", detail=f"row {number}: {one_line(str(error))}")
        else:
            yield number, record


def _text_bytes(batch: pyarrow.RecordBatch, text_field: str) -> list[int | None]:
    import pyarrow
    import pyarrow.compute

    top, *path = text_field.split(".")
    column = batch.column(top)
    for part in path:
        column = pyarrow.compute.struct_field(column, part)
    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        column = column.cast(pyarrow.large_binary()) if not pyarrow.types.is_dictionary(column.type) else column.dictionary_decode()
    return pyarrow.compute.binary_length(column).to_pylist()


def document_of(to_document: RecordReader, record: dict[str, Any], name: str, row: int) -> Document | LeftOut:
    result = to_document(record, f"{name}:{row}")
    return result if isinstance(result, Document) else LeftOut(name, result[0], detail=f"row {row}: {result[1]}".rstrip(": "))
