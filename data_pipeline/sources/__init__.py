"""Where documents come from, one kind of source a file."""

from __future__ import annotations

from data_pipeline.config import (
    ArrowSource,
    CsvSource,
    DatasetsSource,
    JsonlSource,
    ParquetSource,
    PythonStdlibSource,
    SourceBase,
    SourceCodeSource,
    StandardInputSource,
    TextSource,
)
from data_pipeline.sources.arrow_files import Arrow
from data_pipeline.sources.csv_files import Csv
from data_pipeline.sources.datasets_source import HubDatasets
from data_pipeline.sources.interface import (
    NOTES,
    REASONS,
    Document,
    LeftOut,
    ReadContext,
    Source,
    Unit,
)
from data_pipeline.sources.jsonl import Jsonl
from data_pipeline.sources.parquet import Parquet
from data_pipeline.sources.python_stdlib import PythonStdlib
from data_pipeline.sources.source_code import SourceCode
from data_pipeline.sources.standard_input import StandardInput
from data_pipeline.sources.text import Text

__all__ = [
    "KINDS",
    "NOTES",
    "REASONS",
    "Document",
    "LeftOut",
    "ReadContext",
    "Source",
    "Unit",
    "open_source",
]

# A new kind is a section in the schema, a file here, and a line here.
KINDS: dict[type[SourceBase], type[Source]] = {
    PythonStdlibSource: PythonStdlib,
    TextSource: Text,
    JsonlSource: Jsonl,
    ParquetSource: Parquet,
    ArrowSource: Arrow,
    CsvSource: Csv,
    SourceCodeSource: SourceCode,
    DatasetsSource: HubDatasets,
    StandardInputSource: StandardInput,
}


def open_source(config: SourceBase, context: ReadContext) -> Source:
    """The source that a section of the recipe describes; nothing is read yet."""
    return KINDS[type(config)](config, context)
