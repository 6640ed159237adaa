"""The data section of a recipe: sources, tokenizer, cleaning, mixture and packing."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from data_pipeline.cleaning.config import Cleaning, FillInTheMiddle
from data_pipeline.sources.config import DatasetsSource, PythonStdlibSource, SourceConfig, SplitBy
from data_pipeline.tokenizer.config import TokenizerConfig, TrainBPE
from pretrain.core.registry import OneOf
from pretrain.core.section import NonNegative, Positive, Section, Share

AnySource = Annotated[SourceConfig, OneOf()]
# A recipe that leaves the kind out has more often an existing file in mind than a training.
AnyTokenizer = Annotated[TokenizerConfig, OneOf(kind_is_required=True)]

# --- mixture and packing --------------------------------------------------------------------------


class MixtureBase(Section):
    """The fields that every kind of mixture has.

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
        """True: every source has a weight."""
        return True


class Temperature(MixtureBase):
    """Shares in proportion to tokens^(1/temperature) (Conneau & Lample 2019).

    1 is proportional, larger values raise small sources.
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
        """Tokens of the whole run, over all sources."""
        return sum(self.tokens.values())


Mixture = Annotated[Proportional | Weights | Temperature | TokenBudget, Field(discriminator="kind")]


class PackingBase(Section):
    """The fields that every kind of packing has.

    Attributes:
        is_planned: samples are put together before training, from whole documents if they fit.
    """

    is_planned: ClassVar[bool] = False


class Concatenate(PackingBase):
    """Documents back to back, cut every S tokens: no padding, each token once an epoch."""

    kind: Literal["concatenate"] = "concatenate"


class BestFit(PackingBase):
    """Best-fit-decreasing packing (Ding et al. 2024).

    Only documents longer than a sequence are cut; gaps at a sequence's end are padded.
    """

    is_planned: ClassVar[bool] = True
    kind: Literal["best_fit"]


Packing = Annotated[Concatenate | BestFit, Field(discriminator="kind")]


class OrderBase(Section):
    """The fields that every order of samples has.

    Attributes:
        is_megatrons: it is that of Megatron's data sets.
    """

    is_megatrons: ClassVar[bool] = False


class Shuffled(OrderBase):
    """A keyed permutation of the samples in each epoch, which needs no memory and no files."""

    kind: Literal["shuffled"] = "shuffled"


class MegatronOrder(OrderBase):
    """The samples of Megatron-LM's GPTDataset and BlendedDataset, in its order."""

    is_megatrons: ClassVar[bool] = True
    kind: Literal["megatron"]
    samples: Positive | None = Field(
        None,
        description=(
            "samples that the order is made for: Megatron's train_samples, or train_iters x"
            " global_batch_size; the run's own by default. Another number is another order"
        ),
    )
    eod_mask_loss: bool | None = Field(
        None,
        description=(
            "no loss on the token after an end-of-document token; as data.document_mask by default"
        ),
    )
    surplus: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.005,
        description=(
            "with mixture weights: share of samples that are made of each source beyond those that"
            " are used, Megatron's mid_level_dataset_surplus"
        ),
    )


def _by_name(value: Any) -> Any:
    """Take ``order: megatron`` as ``order: {kind: megatron}``."""
    return {"kind": value} if isinstance(value, str) else value


Order = Annotated[
    Annotated[Shuffled | MegatronOrder, Field(discriminator="kind")], BeforeValidator(_by_name)
]


def _own_splits(name: Any, section: Any) -> list[tuple[Any, Any]]:
    """Return a section by its name, or the two that a ``validation_split`` makes of it."""
    if isinstance(section, DatasetsSource):
        section = section.model_dump()
    if not isinstance(section, dict) or section.get("validation_split") is None:
        return [(name, section)]
    held_out = section["validation_split"]
    if section.get("split", "hash") != "hash":
        raise ValueError(
            f"'validation_split' of the source '{name}' says what is held out: leave 'split' out"
        )
    rest = {key: value for key, value in section.items() if key != "validation_split"}
    # What limits the training data does not shorten the other split.
    limits = ("max_samples", "max_documents", "data_files")
    own = {key: value for key, value in rest.items() if key not in limits}
    return [
        (name, {**rest, "split": "train"}),
        (f"{name}_validation", {**own, "dataset_split": held_out, "split": "validation"}),
    ]


class DataConfig(Section):
    """The data of a run: sources, tokenizer, cleaning, split, mixture and packing."""

    path: str | None = Field(
        None, description="folder of the shards, or their prefix; data/<name> by default"
    )
    corpora: dict[str, str] | None = Field(
        None, description="several built data folders (name: path) to mix, instead of 'path'"
    )
    source: AnySource | None = Field(
        None, description="one source; the standard library's code by default"
    )
    sources: dict[str, AnySource] | None = Field(
        None, description="several sources by name, instead of 'source'"
    )
    tokenizer: AnyTokenizer = TrainBPE()
    cleaning: Cleaning = Cleaning()
    fill_in_the_middle: FillInTheMiddle | None = None
    validation_share: Annotated[
        float, Field(ge=0.0, lt=1.0, description="share of documents held out, by a hash")
    ] = 0.05
    # Left out of a dump if it is not given, so that data from before it is still known.
    validation_documents: Positive | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description=(
            "documents held out, exactly, instead of validation_share: those with the lowest hashes."
            " The input is read once more to find them"
        ),
    )
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
    order: Order = Field(
        Shuffled(),
        description="of the samples: 'shuffled', or that of Megatron-LM's data sets: 'megatron'",
    )
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
    streaming_lanes: Positive | None = Field(
        None,
        description=(
            "with streaming: parts of the data that are read side by side, each on one rank if the"
            " ranks divide them; a divisor of train.global_batch_size, chosen by the number of"
            " files when left out"
        ),
    )
    shuffle_buffer_documents: NonNegative = Field(
        1024,
        description=(
            "with streaming: documents of a source, over all lanes, that are shuffled together;"
            " 0 keeps the source's order"
        ),
    )
    streaming_retries: NonNegative = Field(
        6,
        description=(
            "attempts after a hub has failed, one after the other, with waits of 1, 2, 4, ... up to"
            " 60 seconds"
        ),
    )
    streaming_timeout_seconds: Annotated[float, Field(gt=0)] = Field(
        30.0, description="without a byte from a hub, after which an attempt has failed"
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

    @model_validator(mode="after")
    def _an_exact_split_is_possible(self) -> DataConfig:
        if self.validation_documents is None:
            return self
        by_name = self.cleaning.exact_duplicates and self.split_by != "content"
        refused = {
            "streaming, which has streaming_validation_documents for it": self.streaming,
            "cleaning.near_duplicates, which removes documents later": (
                self.cleaning.near_duplicates is not None
            ),
            f"split_by: {self.split_by} and cleaning.exact_duplicates, which removes documents"
            " later": by_name,
            "a source of split: validation, which is held out already": any(
                source.split == "validation" for source in self.named_sources.values()
            ),
        }
        for what, is_used in refused.items():
            if is_used:
                raise ValueError(
                    f"'validation_documents' does not go with {what}: leave one of them out"
                )
        return self

    @model_validator(mode="after")
    def _megatron_knows_the_order(self) -> DataConfig:
        if not self.order.is_megatrons:
            return self
        refused = {
            "data.streaming, which reads documents as they come": self.streaming,
            "data.packing.kind=best_fit, because its samples are cut from documents back to back": (
                self.packing.is_planned
            ),
            f"data.mixture.kind={self.mixture.kind}, because a blend has weights or reads each"
            " source once": not isinstance(self.mixture, Proportional | Weights),
            "data.mixture.max_epochs, because a blend repeats each source as its weight asks": bool(
                self.mixture.max_epochs
            ),
        }
        for what, is_used in refused.items():
            if is_used:
                raise ValueError(
                    f"data.order=megatron does not go with {what}: leave one of them out"
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _own_splits_are_two_sources(cls, content: Any) -> Any:
        """Make two sources of one whose data set brings its own validation split."""
        if not isinstance(content, dict):
            return content
        source, sources = content.get("source"), content.get("sources")
        named = {"all": source} if sources is None else sources
        if (source is not None and sources is not None) or not isinstance(named, dict):
            return content
        expanded: dict[Any, Any] = {}
        for name, section in named.items():
            for part, own in _own_splits(name, section):
                if part in expanded or (part != name and part in named):
                    raise ValueError(
                        f"'{name}' with a validation_split needs the name '{part}' too: rename the"
                        " source that has it"
                    )
                expanded[part] = own
        if len(expanded) == len(named):
            return content
        return {**content, "source": None, "sources": expanded}

    @property
    def leaves_out_labels(self) -> bool:
        """Whether some tokens of a training batch have no label and must be counted."""
        return self.document_mask or self.packing.is_planned or self.masks_eod_loss

    @property
    def masks_eod_loss(self) -> bool:
        """Whether Megatron's order takes no loss on the token after an end-of-document token."""
        if not isinstance(self.order, MegatronOrder):
            return False
        masks = self.order.eod_mask_loss
        return self.document_mask if masks is None else masks

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """The sources by name; a single one is called 'all'.

        With ``streaming`` those that can be are read where they are.
        """
        named = (
            self.sources
            if self.sources is not None
            else {"all": self.source or PythonStdlibSource(kind="python_stdlib")}
        )
        if not self.streaming:
            return named
        return {
            name: source.model_copy(update={"streaming": True})
            if isinstance(source, DatasetsSource)
            else source
            for name, source in named.items()
        }

    @property
    def training_sources(self) -> dict[str, SourceConfig]:
        """The sources by name without those that are held out as a whole."""
        return {
            name: source
            for name, source in self.named_sources.items()
            if source.split != "validation"
        }

    @property
    def held_out_sources(self) -> list[str]:
        """The sources that a stream's validation split is from.

        Those that are held out as a whole, if there are any.
        """
        sources = self.named_sources
        whole = [name for name, source in sources.items() if source.split == "validation"]
        return whole or [name for name, source in sources.items() if source.split == "hash"]
