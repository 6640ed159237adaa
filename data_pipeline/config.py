"""The data section of a recipe: sources, tokenizer, cleaning, mixture and packing."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from data_pipeline.cleaning.config import Cleaning, FillInTheMiddle
from pretrain.core.section import NonNegative, Positive, Section, Share

# --- sources --------------------------------------------------------------------------------------


class SourceBase(Section):
    """What every kind of source has.

    ``can_be_read_again`` is false for what comes once, as a pipe.
    """

    can_be_read_again: ClassVar[bool] = True

    split: Literal["hash", "train", "validation"] = Field(
        "hash",
        description=(
            "'hash' holds out data.validation_share of the documents; the others send every"
            " document to one side"
        ),
    )


class FilesBase(SourceBase):
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
    """How a record becomes a document.

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
        [], description="fields that are kept beside the document in reports"
    )


class PythonStdlibSource(SourceBase):
    """The source code of the running interpreter's standard library, without its tests: a corpus
    that every machine has.
    """

    kind: Literal["python_stdlib"] = "python_stdlib"


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
    """Text files: one document a file, a line, or a part between separators; plain or compressed
    (.gz, .zst, .bz2, .xz, .lz4).
    """

    kind: Literal["text"]
    document: Literal["file", "line", "separator"] = "file"
    separator: str | None = Field(
        None, description="with document=separator: the line that stands between two documents"
    )
    encoding: Encoding = "utf-8"

    @model_validator(mode="after")
    def _separator_belongs(self) -> TextSource:
        if (self.document == "separator") != (self.separator is not None):
            raise ValueError("'separator' and document=separator go together: give both or neither")
        return self


class JsonlSource(FoldersBase, RecordsBase):
    """JSON objects: one a line, in an array, or one after the other; plain or compressed (.gz,
    .zst, .bz2, .xz, .lz4).
    """

    kind: Literal["jsonl"]
    encoding: Encoding = "utf-8"


class ParquetSource(FoldersBase, RecordsBase):
    """Apache Parquet, one document a row."""

    kind: Literal["parquet"]


class ArrowSource(FoldersBase, RecordsBase):
    """Arrow IPC files or streams (.arrow, .ipc, .feather), one document a row."""

    kind: Literal["arrow"]


Character = Annotated[str, Field(min_length=1, max_length=1)]


class CsvSource(FoldersBase, RecordsBase):
    """Rows of values with a header line; plain or compressed (.gz, .zst, .bz2, .xz, .lz4)."""

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
    """Folders of source code, one document a file; what .gitignore names, binary files and too
    large ones are left out.
    """

    kind: Literal["source_code"]
    suffixes: list[str] | None = Field(
        None, description="file name endings to read, such as .py; every text file by default"
    )
    max_file_bytes: Positive = 1_000_000
    respect_gitignore: bool = True


Preset = Literal[
    "wikitext_103_raw",
    "c4_en",
    "zyda_2",
    "codeparrot_clean_train",
    "codeparrot_clean_valid",
    "fineweb",
    "the_stack",
]


class DatasetsSource(SourceBase):
    """A Hugging Face data set: a hub name, or a local folder or mirror of it.

    A preset fills in what is left out.
    """

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
    group: Literal["wikitext_articles"] | None = Field(
        None, description="rows that belong to one document are joined"
    )
    max_documents: Positive | None = None

    @model_validator(mode="after")
    def _names_something(self) -> DatasetsSource:
        if self.preset is None and self.dataset is None:
            raise ValueError("name a data set with 'dataset', or take a 'preset'")
        return self


class StandardInputSource(SourceBase, RecordsBase):
    """What is piped into the command; it is kept in the output folder's staging area until the
    build is complete.
    """

    can_be_read_again: ClassVar[bool] = False
    kind: Literal["stdin"]
    format: Literal["jsonl", "line", "text"] = Field(
        "jsonl", description="JSON lines, one document a line, or one document in all"
    )
    encoding: Encoding = "utf-8"


Source = Annotated[
    PythonStdlibSource
    | TextSource
    | JsonlSource
    | ParquetSource
    | ArrowSource
    | CsvSource
    | SourceCodeSource
    | DatasetsSource
    | StandardInputSource,
    Field(discriminator="kind"),
]

# --- tokenizers -----------------------------------------------------------------------------------


class TokenizerBase(Section):
    """Which tokens stand around a document.

    Names are looked up in the vocabulary; left out, well-known ones are searched.
    """

    eod_token: str | None = Field(None, description="the token that ends a document")
    bos_token: str | None = None
    pad_token: str | None = None
    append_eod: bool = True
    prepend_bos: bool = False


class ExistingTokenizer(TokenizerBase):
    vocab_size: Positive | None = Field(
        None,
        description="entries; checked against the file, and used for planning before it is there",
    )


class TrainBPE(TokenizerBase):
    """A byte-level BPE tokenizer trained on a sample of the training split."""

    kind: Literal["train_bpe"] = "train_bpe"
    vocab_size: Annotated[int, Field(ge=258, description="entries, special tokens included")] = 4096
    min_frequency: Positive = 2
    digits: Literal["as_words", "single", "triples"] = Field(
        "as_words", description="'single': every digit a token; 'triples': up to three"
    )
    whitespace: Literal["gpt2", "runs"] = Field(
        "gpt2", description="'runs' keeps indentation in tokens of its own, for code"
    )
    eod_token: str = "<|endoftext|>"
    reserved_tokens: list[str] = Field(
        [], description="special tokens that get an id, such as those of fill-in-the-middle"
    )
    sample_bytes: Positive = Field(
        1 << 30, description="of text that the training looks at, chosen by a hash of each document"
    )
    sample_weights: dict[str, float] | None = Field(
        None, description="share of the sample for each source; by size when left out"
    )

    @property
    def special_tokens(self) -> list[str]:
        """All special tokens in the order of their ids, from 0."""
        named = [self.eod_token, *self.reserved_tokens, self.bos_token, self.pad_token]
        return list(dict.fromkeys(token for token in named if token is not None))

    @model_validator(mode="after")
    def _special_tokens_have_room(self) -> TrainBPE:
        if len(set(self.reserved_tokens)) < len(self.reserved_tokens):
            raise ValueError("'reserved_tokens' names a token twice")
        if short := [token for token in self.special_tokens if len(token) < 2]:
            raise ValueError(
                f"the special token '{short[0]}' is too short: single characters stand for bytes"
            )
        if self.prepend_bos and self.bos_token is None:
            raise ValueError("prepend_bos needs a name for the token: give bos_token")
        if self.vocab_size <= 256 + len(self.special_tokens):
            raise ValueError(
                f"vocab_size must be larger than {256 + len(self.special_tokens)}: 256 bytes and"
                " the special tokens come first"
            )
        return self


class TokenizerFile(ExistingTokenizer):
    """An existing ``tokenizer.json``."""

    kind: Literal["file"]
    path: str


class SentencePieceFile(ExistingTokenizer):
    """A SentencePiece ``.model``, turned into an equal ``tokenizer.json``."""

    kind: Literal["sentencepiece"]
    path: str


class TiktokenFile(ExistingTokenizer):
    """A tiktoken vocabulary (base64 tokens and ranks), turned into an equal ``tokenizer.json``."""

    kind: Literal["tiktoken"]
    path: str
    pattern: str = Field(
        description=(
            "the regular expression that cuts text into words, or the name of a tiktoken encoding"
            " that has it"
        )
    )
    special_tokens: dict[str, int] = {}


class MistralFile(ExistingTokenizer):
    """A tokenizer that ships inside the package mistral-common, such as tekken_240911.json or
    tokenizer.model.v3.
    """

    kind: Literal["mistral"]
    name: str


TokenizerConfig = Annotated[
    TrainBPE | TokenizerFile | SentencePieceFile | TiktokenFile | MistralFile,
    Field(discriminator="kind"),
]

# --- mixture and packing --------------------------------------------------------------------------


class MixtureBase(Section):
    """What every kind of mixture has.

    Attributes:
        can_stream: it needs no counts of the sources' tokens, which streams do not have.
    """

    can_stream: ClassVar[bool] = True

    max_epochs: dict[str, float] = Field(
        {},
        description=(
            "a source that was seen this often is exhausted, and the others share its weight"
        ),
    )

    @property
    def total_tokens(self) -> int | None:
        """Tokens of a whole run, if the mixture is for one of a given length."""
        return None

    @property
    def shares_are_given(self) -> bool:
        """Whether it names a share for every source."""
        return False


class Proportional(MixtureBase):
    """Every token has the same chance."""

    kind: Literal["proportional"] = "proportional"


class Weights(MixtureBase):
    """Shares of the samples, in proportion to these numbers."""

    kind: Literal["weights"]
    weights: dict[str, Annotated[float, Field(ge=0)]]

    @property
    def shares_are_given(self) -> bool:
        return True


class Temperature(MixtureBase):
    """Shares in proportion to tokens^(1/temperature) (Conneau & Lample 2019): 1 is proportional,
    larger ones raise small sources.
    """

    can_stream: ClassVar[bool] = False
    kind: Literal["temperature"]
    temperature: Annotated[float, Field(gt=0)]


class TokenBudget(MixtureBase):
    """Tokens that the whole run takes of each source."""

    kind: Literal["tokens"]
    can_stream: ClassVar[bool] = False
    tokens: dict[str, NonNegative]

    @property
    def total_tokens(self) -> int | None:
        return sum(self.tokens.values())


Mixture = Annotated[Proportional | Weights | Temperature | TokenBudget, Field(discriminator="kind")]


class PackingBase(Section):
    """What every kind of packing has.

    Attributes:
        is_planned: samples are put together before training, from whole documents if they fit.
    """

    is_planned: ClassVar[bool] = False


class Concatenate(PackingBase):
    """Documents back to back, cut every S tokens: no padding, each token once an epoch."""

    kind: Literal["concatenate"] = "concatenate"


class BestFit(PackingBase):
    """Best-fit-decreasing packing (Ding et al. 2024): only documents longer than a sequence are
    cut; gaps at a sequence's end are padded.
    """

    is_planned: ClassVar[bool] = True
    kind: Literal["best_fit"]


Packing = Annotated[Concatenate | BestFit, Field(discriminator="kind")]

SplitBy = Literal["content", "path", "id"]


class DataConfig(Section):
    path: str | None = Field(
        None, description="folder of the shards, or their prefix; data/<name> by default"
    )
    corpora: dict[str, str] | None = Field(
        None, description="several built data folders (name: path) to mix, instead of 'path'"
    )
    source: Source | None = Field(
        None, description="one source; the standard library's code by default"
    )
    sources: dict[str, Source] | None = Field(
        None, description="several sources by name, instead of 'source'"
    )
    tokenizer: TokenizerConfig = TrainBPE()
    cleaning: Cleaning = Cleaning()
    fill_in_the_middle: FillInTheMiddle | None = None
    validation_share: Annotated[
        float, Field(ge=0.0, lt=1.0, description="share of documents held out, by a hash")
    ] = 0.05
    split_by: SplitBy = Field(
        "content",
        description=(
            "what is hashed: 'content', the text as it is stored, so that equal texts are on one"
            " side; 'path', of its file, so that a file's records are; 'id', the record's id_field"
        ),
    )
    split_root: str | None = Field(
        None,
        description=(
            "with split_by=path: paths count from this folder on; by default from the root of the"
            " disk"
        ),
    )
    max_shard_bytes: Annotated[int, Field(ge=1 << 16)] | None = Field(
        4 << 30, description="of one .bin; none for a single file"
    )
    on_bad: Literal["skip", "fail"] = Field(
        "skip", description="what a record that cannot be read does; skipped ones are listed"
    )
    max_bad_share: Share = Field(
        0.05,
        description=(
            "a larger share of bad records, or of bytes lost with them, in any source stops the"
            " build"
        ),
    )
    max_record_bytes: Positive = Field(256 << 20, description="longer records are bad")
    unit_bytes: Positive | None = Field(
        None,
        description=(
            "of input that a worker takes at once; chosen by the input's size when left out"
        ),
    )
    mixture: Mixture = Proportional()
    packing: Packing = Concatenate()
    document_mask: bool = Field(
        False, description="attention stays inside a document, and no loss is taken across its end"
    )
    verify: Literal["sizes", "sample", "full"] = Field(
        "sample",
        description=(
            "what training compares with the manifest at its start: sizes alone; also a random"
            " block of 64 MiB of every file, in the background of the first steps; or every byte,"
            " before them"
        ),
    )
    streaming: bool = Field(
        False,
        description=(
            "training reads the source itself; the shards then hold only the validation split"
        ),
    )
    streaming_validation_documents: Positive = Field(
        256, description="with streaming: documents held out for validation"
    )

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> DataConfig:
        if self.source is not None and self.sources is not None:
            raise ValueError("give 'source' or 'sources', not both")
        if self.sources is not None and not self.sources:
            raise ValueError("'sources' is empty: name at least one")
        if self.path is not None and self.corpora is not None:
            raise ValueError("give 'path' or 'corpora', not both")
        if self.split_root is not None and self.split_by != "path":
            raise ValueError("'split_root' belongs to split_by: path")
        return self

    @property
    def leaves_out_labels(self) -> bool:
        """Whether some tokens of a training batch have no label, so that they have to be counted."""
        return self.document_mask or self.packing.is_planned

    @property
    def named_sources(self) -> dict[str, Source]:
        """The sources by name; a single one is called 'all'."""
        return (
            self.sources
            if self.sources is not None
            else {"all": self.source or PythonStdlibSource()}
        )
