"""Reads Arrow IPC: files and streams.

pyarrow, polars, Feather (version 2) and the package ``datasets`` write them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import TYPE_CHECKING

from data_pipeline.sources.arrow_rows import (
    BATCH_ROWS,
    check_columns,
    document_of,
    rows_of,
    top_columns,
)
from data_pipeline.sources.config import ArrowSource
from data_pipeline.sources.files import one_line, stamp_of, unreadable
from data_pipeline.sources.folders import files_of
from data_pipeline.sources.interface import Document, LeftOut, Source, Unit
from data_pipeline.sources.records import RecordReader
from pretrain.core.errors import DataError

if TYPE_CHECKING:
    import pyarrow

FILE_MAGIC = b"ARROW1"
# Each message of a stream begins with the marker and its length, which is 0 at the end. A stream
# may just stop too; then nobody can know if something is missing. Streams of before 2019 have no
# marker, only the length.
MARKER = b"\xff\xff\xff\xff"
NO_LENGTH = b"\0\0\0\0"


class Arrow(Source[ArrowSource]):
    """A file is one unit, mapped into memory.

    What follows a batch that cannot be read is left out as ``damaged_file``.
    """

    def units(self, unit_bytes: int) -> list[Unit]:
        units = []
        for path in files_of(self.config):
            size, stamp = stamp_of(path)
            with _open(path) as (schema, _, _):
                check_columns(schema, self.config, path)
            units.append(Unit(self.context.name, (path,), size=size, stamp=stamp))
        return units

    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        import pyarrow

        path = unit.files[0]
        to_document = RecordReader(self.config)
        row = 0
        with _open(path) as (schema, batches, unread):
            check_columns(schema, self.config, path)
            columns = top_columns(schema, self.config)
            while True:
                rest = unread()
                try:
                    batch = next(batches, None)
                    if batch is None:
                        break
                    batch = batch.select(columns)
                    _check_offsets(batch)
                except (pyarrow.ArrowException, OSError, ValueError) as error:
                    if isinstance(error, OSError) and error.errno is not None:
                        raise unreadable(path, error) from None
                    yield LeftOut(
                        path,
                        "damaged_file",
                        detail=f"row {row} and all after it: {one_line(str(error))}",
                        size=rest,
                    )
                    return
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    part = batch.slice(start, BATCH_ROWS)
                    for result in rows_of(
                        part, self.config, path, row + start, self.context.max_record_bytes
                    ):
                        yield (
                            result
                            if isinstance(result, LeftOut)
                            else document_of(to_document, result, path)
                        )
                row += batch.num_rows
        if _ends_early(path):
            yield LeftOut(
                path,
                "damaged_file",
                detail=(
                    f"the stream stops after row {row - 1} without its end marker: rows may be"
                    " missing"
                ),
            )


@contextmanager
def _open(
    path: str,
) -> Iterator[tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch], Callable[[], int]]]:
    """A file's schema, its batches, and about how many of its bytes are not read yet.

    Raises:
        DataError: for a file that is not there or not Arrow's.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(path) as mapped:
            is_file = mapped.read(len(FILE_MAGIC)) == FILE_MAGIC
            mapped.seek(0)
            reader = pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)
            size = mapped.size()
            schema = reader.schema
            if not is_file:
                yield schema, iter(reader), lambda: size - mapped.tell()
                return
            count = reader.num_record_batches
            numbers = iter(range(count))
            yield (
                schema,
                map(reader.get_batch, numbers),
                lambda: size * length_hint(numbers) // max(count, 1),
            )
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from None
        raise DataError(
            f"{path} is no Arrow file or stream, or is cut short ({one_line(str(error))}): fetch it"
            " again or leave it out"
        ) from None


def _check_offsets(batch: pyarrow.RecordBatch) -> None:
    """Check that a batch's columns point inside their own bytes.

    Raises:
        pyarrow.ArrowInvalid: if one does not. Bytes that are not UTF-8 are found later, row by
            row.
    """
    import pyarrow

    for column in batch.columns:
        kind = column.type
        if pyarrow.types.is_string(kind):
            column = column.view(pyarrow.binary())
        elif pyarrow.types.is_large_string(kind):
            column = column.view(pyarrow.large_binary())
        column.validate(full=True)


def _ends_early(path: str) -> bool:
    with open(path, "rb") as stream:
        start = stream.read(len(FILE_MAGIC))
        if start == FILE_MAGIC:
            return False
        end = MARKER + NO_LENGTH if start.startswith(MARKER) else NO_LENGTH
        stream.seek(-min(len(end), os.path.getsize(path)), os.SEEK_END)
        return stream.read() != end
