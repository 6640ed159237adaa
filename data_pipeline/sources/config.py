"""The sources of a recipe: a section for each kind, without what reads it.

``implementation`` names the reader, so that a recipe is validated without importing pyarrow or
any other package of a format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.core.registry import Component
from pretrain.core.section import Positive, Section

SplitBy = Literal["content", "path", "id"]


class SourceConfig(Component):
    """The fields that every kind of source has.

    ``implementation`` is called with the section and a ``ReadContext`` and returns a ``Source``
    (``data_pipeline.sources.interface``).

    Attributes:
        can_be_read_again: false for input that arrives once, such as a pipe.
        reasons: what a left-out record's reason means, for reasons that this kind adds.
        notes: likewise for the remarks that it counts.
        fetching: fields that say how the input is fetched, or which input where the units' stamps
            say that too. Other values of them make no other data.
    """

    can_be_read_again: ClassVar[bool] = True
    reasons: ClassVar[Mapping[str, str]] = {}
    notes: ClassVar[Mapping[str, str]] = {}
    fetching: ClassVar[frozenset[str]] = frozenset()

    split: Literal["hash", "train", "validation"] = Field(
        "hash",
        description=(
            "'hash' holds out data.validation_share of the documents; the others send every"
            " document to one side"
        ),
    )


class FilesBase(SourceConfig):
    """The fields of sources that read files."""

    input: Annotated[
        list[str],
        Field(
            min_length=1,
            description="file names, folders, or glob patterns; ** reaches into subfolders",
        ),
    ]


class FoldersBase(FilesBase):
    """Files, or folders that hold files of the kind."""

    # Left out of a dump if it is not given, so that data built before folders could be read is
    # still known by its checksum.
    config: str | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="of a folder whose README.md declares several",
    )
    dataset_split: str | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="of a folder with splits: train if there is one; 'all' reads every file",
    )


class RecordsBase(Section):
    """The fields that say how a record becomes a document.

    A field's name is looked up as it is, then as a path: a.b is b inside a.
    """

    text_field: str = Field(
        "text", description="the record's field that holds the text; a.b reaches into a"
    )
    id_field: str | None = Field(
        None,
        description="a field that names the document for ever, in reports and for data.split_by=id",
    )
    metadata_fields: list[str] = Field(
        [], description="fields that are kept with the document in reports"
    )


class PythonStdlibSource(SourceConfig):
    """The source code of the running interpreter's standard library, without its tests.

    Every machine has this corpus.
    """

    implementation: ClassVar[str] = "data_pipeline.sources.python_stdlib:PythonStdlib"
    kind: Literal["python_stdlib"]


Encoding = Annotated[
    str,
    Field(
        description=(
            "of the text, by Python's names; of UTF-8 files those with a mark of UTF-16 or UTF-32"
            " are read as that"
        )
    ),
]


class TextSource(FoldersBase):
    """Text files: one document a file, a line, or a part between separators.

    They may be compressed (.gz, .zst, .bz2, .xz, .lz4).
    """

    implementation: ClassVar[str] = "data_pipeline.sources.text:Text"
    kind: Literal["text"]
    document: Literal["file", "line", "separator"] = "file"
    separator: str | None = Field(
        None, description="with document=separator: the line between two documents"
    )
    encoding: Encoding = "utf-8"

    @model_validator(mode="after")
    def _separator_belongs(self) -> TextSource:
        if (self.document == "separator") != (self.separator is not None):
            raise ValueError("'separator' and document=separator go together: give both or neither")
        return self


class JsonlSource(FoldersBase, RecordsBase):
    """JSON objects: one a line, in an array, or one after the other.

    Files may be compressed (.gz, .zst, .bz2, .xz, .lz4).
    """

    implementation: ClassVar[str] = "data_pipeline.sources.jsonl:Jsonl"
    kind: Literal["jsonl"]
    encoding: Encoding = "utf-8"


class ParquetSource(FoldersBase, RecordsBase):
    """Apache Parquet, one document a row."""

    implementation: ClassVar[str] = "data_pipeline.sources.parquet:Parquet"
    kind: Literal["parquet"]


class ArrowSource(FoldersBase, RecordsBase):
    """Arrow IPC files or streams (.arrow, .ipc, .feather), one document a row."""

    implementation: ClassVar[str] = "data_pipeline.sources.arrow_files:Arrow"
    kind: Literal["arrow"]


Character = Annotated[str, Field(min_length=1, max_length=1)]


class CsvSource(FoldersBase, RecordsBase):
    """Rows of values with a header line; plain or compressed (.gz, .zst, .bz2, .xz, .lz4)."""

    implementation: ClassVar[str] = "data_pipeline.sources.csv_files:Csv"
    kind: Literal["csv"]
    delimiter: Character | None = Field(
        None,
        description="by default the one of , tab ; | that cuts the header into the wanted columns",
    )
    quoting: bool | None = Field(
        None,
        description=(
            'whether "..." may hold delimiters and line ends; yes by default, but not between tabs'
        ),
    )
    escape: Character | None = Field(
        None, description="a character that takes the next one's meaning away, such as \\"
    )
    columns: list[str] | None = Field(
        None, description="the columns' names, for files without a header line"
    )
    encoding: Encoding = "utf-8"


class SourceCodeSource(FilesBase):
    """Folders of source code, one document a file.

    Binary files, too large ones, and those that .gitignore names are left out.
    """

    implementation: ClassVar[str] = "data_pipeline.sources.source_code:SourceCode"
    kind: Literal["source_code"]
    suffixes: list[str] | None = Field(
        None, description="file name endings to read, such as .py; every text file by default"
    )
    max_file_bytes: Positive = 1_000_000
    respect_gitignore: bool = True


Preset = Literal[
    "wikitext_103_raw",
    "c4_en",
    "pile_uncopyrighted",
    "zyda_2",
    "codeparrot_clean_train",
    "codeparrot_clean_valid",
    "fineweb",
    "open_web_math",
    "code_instructions_120k",
    "the_stack",
]


class DatasetsSource(SourceConfig):
    """A Hugging Face data set: a hub name, or a local folder or mirror of it.

    A preset fills in what is left out.
    """

    implementation: ClassVar[str] = "data_pipeline.sources.datasets_source:HubDatasets"
    reasons: ClassVar[Mapping[str, str]] = {
        "blank_row": "a blank row between others, with group: rows"
    }
    kind: Literal["datasets"]
    preset: Preset | None = None
    dataset: str | None = Field(None, description="hub name, or the path of a local folder")
    config: str | None = None
    dataset_split: str | None = Field(None, description="split of the data set, such as train")
    revision: str | None = None
    data_files: str | list[str] | None = None
    streaming: bool = Field(False, description="read over the network without keeping the files")
    text_field: str | None = None
    id_field: str | None = None
    metadata_fields: list[str] = []
    group: Literal["wikitext_articles", "rows"] | None = Field(
        None,
        description=(
            "what rows become a document: wikitext_articles joins them from one heading to the"
            " next; rows takes each that is not blank, also with a preset that joins them"
        ),
    )
    max_documents: Positive | None = None
    # Both are left out of a dump if they are not given, so that data from before them is known.
    max_samples: Annotated[int, Field(ge=-1)] = Field(
        -1,
        exclude_if=lambda value: value == -1,
        description=(
            "rows that are read from the start, blank ones included and before 'group' joins them;"
            " -1: all of them"
        ),
    )
    validation_split: str | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description=(
            "split of the data set that is held out, such as validation or test; all of"
            " dataset_split is trained on then, and the data section has two sources"
        ),
    )

    @model_validator(mode="after")
    def _names_something(self) -> DatasetsSource:
        if self.preset is None and self.dataset is None:
            raise ValueError("name a data set with 'dataset', or take a 'preset'")
        if self.max_samples == 0:
            raise ValueError("'max_samples' of 0 reads nothing: give at least 1, or -1 for all")
        return self


class KaggleSource(SourceConfig, RecordsBase):
    """Files of a Kaggle data set, by Kaggle's own client.

    Credentials come from the environment or from ~/.kaggle, never from a recipe.
    """

    implementation: ClassVar[str] = "data_pipeline.sources.kaggle:Kaggle"
    fetching: ClassVar[frozenset[str]] = frozenset({"version", "stall_seconds", "attempts"})
    kind: Literal["kaggle"]
    dataset: Annotated[
        str, Field(pattern=r"^[\w-]+/[\w.-]+$", description="owner/name, as in the page's address")
    ]
    version: Positive | None = Field(
        None, description="number of the version; the newest by default, which the manifest names"
    )
    files: list[str] = Field(
        [], description="names of files or folders in it, or patterns; all of its files by default"
    )
    format: Literal["jsonl", "csv", "parquet", "text", "line"] | None = Field(
        None, description="of all files; by default that of each file's name"
    )
    encoding: Encoding = "utf-8"
    stall_seconds: Annotated[float, Field(gt=0)] = Field(
        60.0, description="without a byte from Kaggle, after which an attempt has failed"
    )
    attempts: Positive = Field(4, description="of a download that the network breaks off")


class StandardInputSource(SourceConfig, RecordsBase):
    """Text that is piped into the command.

    It is kept in the output folder's staging area until the build is complete.
    """

    implementation: ClassVar[str] = "data_pipeline.sources.standard_input:StandardInput"
    can_be_read_again: ClassVar[bool] = False
    kind: Literal["stdin"]
    format: Literal["jsonl", "line", "text"] = Field(
        "jsonl", description="JSON lines, one document a line, or one document in all"
    )
    encoding: Encoding = "utf-8"
