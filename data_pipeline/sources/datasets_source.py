"""Data sets of the Hugging Face hub or local copies, read with the package ``datasets``."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.sources.arrow_rows import (
    BATCH_ROWS,
    Row,
    check_columns,
    column_at,
    document_of,
    rows_of,
    top_columns,
)
from data_pipeline.sources.config import DatasetsSource, RecordsBase
from data_pipeline.sources.datasets_errors import CHOOSE_SPLIT, library_error
from data_pipeline.sources.file_kinds import DATA, class_of
from data_pipeline.sources.files import one_line
from data_pipeline.sources.folder_walk import is_saved, refuse_pointers, say, snapshot_of, walk
from data_pipeline.sources.hub_layout import ALL
from data_pipeline.sources.hub_stream import HubStream, timeouts
from data_pipeline.sources.interface import Document, LeftOut, ReadContext, Source, Unit
from data_pipeline.sources.presets import fill_in
from data_pipeline.sources.records import RecordReader, listed, text_fault
from pretrain.core.errors import ConfigError, DataError, PipelineError
from pretrain.core.files import JsonObject

if TYPE_CHECKING:
    import numpy as np
    import pyarrow
    from datasets import Dataset, DatasetBuilder, DatasetDict

# WikiText's article heading is a line with one '=' on either side; a section's has two or more,
# each with a space between.
HEADING_START = " = "
HEADING = re.compile(r" = [^= \n](.*[^= \n])? = ?\n?")
HEADING_SCAN_ROWS = 10_000


class HubDatasets(Source[DatasetsSource]):
    """A data set of the package ``datasets``.

    Rows of the memory-mapped table are read in parallel; the package keeps that table in its cache
    (``HF_HOME``).

    ``dataset`` names a data set of the hub, a copy of it, any folder with files of one format, or
    what ``save_to_disk`` wrote. With ``streaming`` nothing is kept, and each shard is a unit.
    ``max_documents`` counts rows, or articles with ``group``, from the start; with either of them
    the whole stream is one unit, because what begins where is known only by reading. What
    ``save_to_disk`` wrote is a table on this disk, which is never streamed.
    """

    has_files = False

    def __init__(self, config: DatasetsSource, context: ReadContext) -> None:
        super().__init__(fill_in(config), context)
        if self.config.group and self.config.id_field:
            raise ConfigError(
                f"source '{context.name}': rows that 'group' joins share no id: leave out"
                " 'id_field' or 'group'"
            )
        # A copy without the hub's README knows nothing of the config that a preset names.
        self._config_is_optional = config.config is None
        self._split_was_named = config.dataset_split is not None
        self._fields = RecordsBase.model_validate(
            self.config.model_dump(include=set(RecordsBase.model_fields))
        )

    @property
    def name(self) -> str:
        assert self.config.dataset is not None
        return self.config.dataset

    def units(self, unit_bytes: int) -> list[Unit]:
        if os.path.isdir(self._path):
            refuse_pointers(os.path.join(self._path, file) for file in walk(self._path))
        if self._is_streamed:
            units = self._shards()
            self._say_unread()
            return units
        table = self._table
        self._say_unread()
        rows_of_unit = max(1, unit_bytes * len(table) // max(table.data.nbytes, 1))
        row_bytes = table.data.nbytes / max(len(table), 1)
        limit = self.config.max_documents or len(table)
        if self.config.group:
            starts = self._article_starts()
            end = int(starts[limit]) if limit < len(starts) else len(table)
        else:
            starts = None
            end = min(limit, len(table))
        units = []
        start = 0
        while start < end:
            stop = min(start + rows_of_unit, end)
            # The article that the unit's end would cut is its last one.
            if starts is not None:
                after = starts.searchsorted(stop)
                stop = min(int(starts[after]), end) if after < len(starts) else end
            units.append(
                Unit(
                    self.context.name,
                    (self.name,),
                    start,
                    stop,
                    int((stop - start) * row_bytes),
                    self._stamp,
                )
            )
            start = stop
        return units

    def _shards(self) -> list[Unit]:
        """The units of a stream: its shards, or all of it where only reading finds a position."""
        name = self.context.name
        if self._is_one_unit:
            return [Unit(name, (self.name,), stamp=self._stamp)]
        try:
            shards = self._stream.shards
        except PipelineError:
            raise
        except Exception as error:
            raise library_error(self.name, error) from None
        return [
            Unit(name, (file,), number, number + 1, stamp=self._stamp)
            for number, file in enumerate(shards)
        ]

    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        yield from self.read_from(unit, 0)

    def read_from(self, unit: Unit, first: int) -> Iterator[Document | LeftOut]:
        """Read a unit from result ``first`` on; a row before it is not read where that is known."""
        if unit.stamp != self._stamp:
            raise DataError(
                f"the data set '{self.name}' changed while it was read: run the same command again"
            )
        # Of rows each gives one result, so that results can be counted as rows.
        skipped = 0 if self.config.group else first
        rows: Iterator[Row | LeftOut] = self._rows(unit, skipped)
        place = unit.files[0] if self._is_streamed else self.name
        if self.config.group:
            results = self._articles(rows)
        else:
            to_document = RecordReader(self._fields)
            results = (
                row if isinstance(row, LeftOut) else document_of(to_document, row, place)
                for row in rows
            )
        limit = self.config.max_documents if self._is_streamed else None
        yield from itertools.islice(
            results, first - skipped, None if limit is None else max(limit - skipped, 0)
        )

    def _rows(self, unit: Unit, first: int) -> Iterator[Row | LeftOut]:
        place = unit.files[0] if self._is_streamed else self.name
        for number, batch in self._batches(unit, first):
            yield from rows_of(batch, self._fields, place, number, self.context.max_record_bytes)

    def _batches(self, unit: Unit, first: int) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
        """Batches with the number of their first row, from the unit's row ``first`` on."""
        if not self._is_streamed:
            table = self._table.with_format("arrow")
            end = unit.end
            assert end is not None
            for start in range(unit.start + first, end, BATCH_ROWS):
                row = start
                for batch in table[start : min(start + BATCH_ROWS, end)].to_batches():
                    yield row, batch
                    row += batch.num_rows
            return
        tables = self._stream.tables(None if self._is_one_unit else unit.start, first, BATCH_ROWS)
        while True:
            try:
                found = next(tables, None)
            except PipelineError:
                raise
            except Exception as error:
                raise library_error(self.name, error) from None
            if found is None:
                return
            row, streamed = found
            check_columns(streamed.schema, self._fields, self.name)
            for batch in streamed.select(top_columns(streamed.schema, self._fields)).to_batches():
                yield row, batch
                row += batch.num_rows

    def _articles(self, rows: Iterator[Row | LeftOut]) -> Iterator[Document | LeftOut]:
        """Yield articles: rows joined from one heading to the next, each with its line end.

        Blank rows before the first text are dropped.
        """
        longest = self.context.max_record_bytes
        first = size = 0
        lines: list[str] = []
        for row in rows:
            fault = (
                None if isinstance(row, LeftOut) else text_fault(row.text, self._fields.text_field)
            )
            if isinstance(row, LeftOut):
                yield row
            elif fault and fault[0] != "empty":
                yield LeftOut(self.name, fault[0], detail=f"row {row.number}: {fault[1]}")
            else:
                line = str(row.text).removesuffix("\n") + "\n"
                if size and HEADING.fullmatch(line):
                    yield self._article(lines, first, size)
                    lines = []
                    size = 0
                if not size:
                    if fault:
                        continue
                    first = row.number
                size += len(line.encode("utf-8"))
                if size > longest:
                    lines = []
                else:
                    lines.append(line)
        if size:
            yield self._article(lines, first, size)

    def _article(self, lines: list[str], first: int, size: int) -> Document | LeftOut:
        if size > self.context.max_record_bytes:
            return LeftOut(
                self.name,
                "too_long",
                detail=(
                    f"row {first}: an article of {size} bytes, the limit is"
                    f" {self.context.max_record_bytes}"
                ),
            )
        return Document("".join(lines), f"{self.name}:{first}")

    def _article_starts(self) -> np.ndarray:
        """Return the numbers of the heading rows; rows before the first one belong to it."""
        import numpy as np
        import pyarrow.compute

        table = self._table.with_format("arrow")
        starts = [0]
        for offset in range(0, len(table), HEADING_SCAN_ROWS):
            column = column_at(table[offset : offset + HEADING_SCAN_ROWS], self._fields.text_field)
            for row in np.flatnonzero(
                pyarrow.compute.starts_with(column, HEADING_START)
                .fill_null(False)
                .to_numpy(zero_copy_only=False)
            ):
                if _is_heading(column[int(row)]):
                    starts.append(offset + int(row))
        return np.array([0, *starts[2:]] if len(starts) > 1 else starts, dtype=np.int64)

    @property
    def _stamp(self) -> str:
        if self._is_streamed:
            return f"{self._builder.config_id}:{self._builder.hash}"
        return str(self._table._fingerprint)

    @cached_property
    def _table(self) -> Dataset:
        import datasets

        path = self._path
        try:
            if is_saved(path):
                table = self._saved_split(datasets.load_from_disk(path))
            else:
                table = datasets.load_dataset(
                    path, self._config_name, split=self.config.dataset_split, **self._choice
                )
        except PipelineError:
            raise
        except Exception as error:
            raise library_error(self.name, error) from None
        check_columns(table.features.arrow_schema, self._fields, self.name)
        return table.select_columns(top_columns(table.features.arrow_schema, self._fields))

    def _saved_split(self, saved: Dataset | DatasetDict) -> Dataset:
        """The split that was asked for, of what ``save_to_disk`` wrote."""
        import datasets

        wanted = str(self.config.dataset_split)
        if isinstance(saved, datasets.DatasetDict):
            if wanted not in saved:
                raise DataError(
                    f"{self.name} has no split '{wanted}' (it has {listed(saved)}): {CHOOSE_SPLIT}"
                )
            return saved[wanted]
        own = str(saved.split or wanted)
        if own != wanted and self._split_was_named:
            raise DataError(
                f"{self.name} is a single saved table, of the split '{own}': leave out"
                " 'dataset_split' (--dataset-split)"
            )
        return saved

    def _say_unread(self) -> None:
        """Says once which splits and which files of a folder are not read."""
        path = self._path
        wanted = str(self.config.dataset_split).partition("[")[0]
        splits: dict[str, list[str]] = {}
        if is_saved(path):
            names = saved_splits(path)
            if not names and self._table.split not in (None, wanted):
                say(f"{self.name}: its only table, of the split '{self._table.split}', is read")
            splits = {name: [] for name in names}
        elif self._builder.config.data_files:
            splits = {
                str(name): list(map(str, files))
                for name, files in self._builder.config.data_files.items()
            }
        others = [name for name in splits if name != wanted and wanted != ALL]
        if others:
            say(f"{self.name}: the split {wanted} is read; not read: {', '.join(others)}")
        if os.path.isdir(path) and not is_saved(path) and not self.config.data_files:
            known = {os.path.realpath(file) for files in splits.values() for file in files}
            rest = [
                file
                for file in walk(path)
                if class_of(file) in DATA
                and os.path.realpath(os.path.join(path, file)) not in known
            ]
            if rest and known:
                say(
                    f"{self.name}: files of no split of this config are not read ({len(rest)}, such"
                    f" as {one_line(rest[0])})"
                )

    @cached_property
    def _builder(self) -> DatasetBuilder:
        import datasets

        if not self._is_streamed:
            try:
                return datasets.load_dataset_builder(self._path, self._config_name, **self._choice)
            except Exception as error:
                raise library_error(self.name, error) from None
        try:
            return self._stream.builder
        except PipelineError:
            raise
        except Exception as error:
            raise library_error(self.name, error) from None

    @cached_property
    def _is_streamed(self) -> bool:
        return self.config.streaming and not is_saved(self._path)

    @property
    def _is_one_unit(self) -> bool:
        return bool(self.config.group or self.config.max_documents)

    @cached_property
    def _stream(self) -> HubStream:
        import datasets

        return HubStream(
            self.name,
            lambda: datasets.load_dataset_builder(
                self._path,
                self._config_name,
                storage_options=timeouts(self.context.patience),
                **self._choice,
            ),
            str(self.config.dataset_split),
            self.context.patience,
        )

    @property
    def _choice(self) -> JsonObject:
        return {"data_files": self.config.data_files, "revision": self.config.revision}

    @property
    def _path(self) -> str:
        path = os.path.expanduser(self.name)
        if os.path.isdir(path):
            return snapshot_of(path)
        if os.path.exists(path):
            raise DataError(
                f"{self.name} is a file: give the folder of a data set, or read the file as --input"
                " of its own format"
            )
        if path.startswith((".", "/")):
            raise DataError(f"data.source.dataset: there is no folder {self.name}: check the path")
        return path

    @property
    def _config_name(self) -> str | None:
        import datasets

        config = self.config.config
        path = self._path
        if (
            config
            and self._config_is_optional
            and os.path.isdir(path)
            and config not in datasets.get_dataset_config_names(path)
        ):
            return None
        return config


def saved_splits(path: str) -> list[str]:
    """Splits of a ``DatasetDict`` that ``save_to_disk`` wrote; none for a single table."""
    try:
        return [
            str(name) for name in json.loads(Path(path, "dataset_dict.json").read_bytes())["splits"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise library_error(path, error) from None


def _is_heading(row: pyarrow.Scalar) -> bool:
    try:
        return HEADING.fullmatch(row.as_py()) is not None
    except UnicodeDecodeError:  # left out when it is read
        return False
