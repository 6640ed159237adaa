"""Apache Parquet: a document is a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from data_pipeline.sources.arrow_rows import (
    BATCH_ROWS,
    Row,
    check_columns,
    columns_of,
    document_of,
    rows_of,
)
from data_pipeline.sources.config import ParquetSource
from data_pipeline.sources.files import one_line, stamp_of, unreadable
from data_pipeline.sources.folders import files_of
from data_pipeline.sources.interface import Document, LeftOut, Source, Unit
from data_pipeline.sources.records import RecordReader
from pretrain.core.errors import DataError

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData, ParquetFile

# About this many bytes are decoded together if rows are known to be long.
BATCH_BYTES = 8 << 20


class RowGroup(NamedTuple):
    """``bytes`` of all its columns, before compression."""

    rows: int
    bytes: int


class Parquet(Source[ParquetSource]):
    """Parquet files.

    Row groups are read in parallel, small ones together, and only the columns that are asked for.

    A file's footer says where everything in it is, so a file without a good one is an error
    before any work is done. Where a page inside cannot be read, the rest of its row group is left
    out as ``damaged_file``, and the next row group is read. Of a row group one page at a time is
    held, which writers keep at about a megabyte or a thousand rows.
    """

    def units(self, unit_bytes: int) -> list[Unit]:
        units = []
        for path in files_of(self.config):
            stamp = stamp_of(path)[1]
            file, groups = self._open(path)
            file.close()
            start = total = 0
            for number, group in enumerate(groups):
                if number > start and total + group.bytes > unit_bytes:
                    units.append(Unit(self.context.name, (path,), start, number, total, stamp))
                    start = number
                    total = 0
                total += group.bytes
            if groups:
                units.append(Unit(self.context.name, (path,), start, len(groups), total, stamp))
        return units

    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        path = unit.files[0]
        to_document = RecordReader(self.config)
        file, groups = self._open(path)
        row = sum(group.rows for group in groups[: unit.start])
        with file:
            for number, group in enumerate(groups[unit.start : unit.end], unit.start):
                for result in self._read_group(file, number, group, path, row):
                    yield (
                        result
                        if isinstance(result, LeftOut)
                        else document_of(to_document, result, path)
                    )
                row += group.rows

    def _read_group(
        self, file: ParquetFile, number: int, group: RowGroup, path: str, first: int
    ) -> Iterator[Row | LeftOut]:
        import pyarrow

        row = first
        problem = "they are not there"
        batch_rows = min(BATCH_ROWS, 1 + BATCH_BYTES * group.rows // (1 + group.bytes))
        try:
            for batch in file.iter_batches(
                batch_rows, row_groups=[number], columns=columns_of(self.config)
            ):
                yield from rows_of(batch, self.config, path, row, self.context.max_record_bytes)
                row += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise unreadable(path, error) from None
            problem = one_line(str(error))
        if row != first + group.rows:
            lost = first + group.rows - row
            size = group.bytes * lost // max(group.rows, 1)
            yield LeftOut(
                path,
                "damaged_file",
                detail=f"rows {row} to {first + group.rows - 1}: {problem}",
                size=size,
            )

    def _open(self, path: str) -> tuple[ParquetFile, list[RowGroup]]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            # A small buffer instead of whole column chunks keeps memory flat for row groups of any
            # size.
            file = ParquetFile(
                path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
            )
            schema = file.schema_arrow
            groups = _row_groups(file.metadata)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise unreadable(path, error) from None
            raise DataError(
                f"{path} is no Parquet file, or is cut short ({one_line(str(error))}): fetch it"
                " again or leave it out"
            ) from None
        check_columns(schema, self.config, path)
        return file, groups


def _row_groups(metadata: FileMetaData) -> list[RowGroup]:
    # Sizes of single columns are not asked for: pyarrow ends the process if a damaged footer
    # holds odd statistics of one.
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if any(min(group.num_rows, group.total_byte_size) < 0 for group in groups):
        raise ValueError("a row group has a negative size")
    return [RowGroup(group.num_rows, group.total_byte_size) for group in groups]
