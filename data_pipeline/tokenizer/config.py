"""The tokenizers of a recipe: a section for each kind, without what loads or trains it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.core.registry import Component
from pretrain.core.section import Positive, Section, Vocabulary


class TokenPolicy(Section):
    """The tokens that begin and end a document.

    Names are looked up in the vocabulary; left out, well-known ones are searched.
    """

    eod_token: str | None = Field(None, description="the token that ends a document")
    bos_token: str | None = None
    pad_token: str | None = None
    append_eod: bool = True
    prepend_bos: bool = False
    parse_special_tokens: bool = Field(
        False,
        description=(
            "special tokens that a text spells out become their ids, for prepared chat or"
            " fill-in-the-middle corpora; otherwise they are ordinary text"
        ),
    )


class TokenizerConfig(TokenPolicy, Component):
    """The fields that every kind of tokenizer has."""

    vocab_size: Vocabulary | None = Field(
        None,
        description="entries; checked against the file, and used for planning before it is there",
    )


class ExistingTokenizer(TokenizerConfig):
    """A tokenizer that is loaded.

    ``implementation`` is called with the section and returns the bytes of a ``tokenizer.json`` or
    of a SentencePiece model, and a name for their origin, which error messages quote.
    """


class TrainedTokenizer(TokenizerConfig):
    """A tokenizer that is trained on a sample of the training split.

    ``implementation`` is called with an iterator over texts and the section and returns a
    ``Tokenizer`` (``data_pipeline.tokenizer.tokenizer``). It must be deterministic: the same texts
    have to give the same bytes, or data that was built before is not recognised.
    """

    vocab_size: Vocabulary = Field(description="entries, special tokens included")
    sample_bytes: Positive = Field(
        1 << 30, description="of text that the training looks at, chosen by a hash of each document"
    )
    sample_weights: dict[str, float] | None = Field(
        None, description="share of the sample for each source; by size when left out"
    )


class TrainBPE(TrainedTokenizer):
    """A byte-level BPE tokenizer trained on a sample of the training split."""

    implementation: ClassVar[str] = "data_pipeline.tokenizer.training:train_bpe"
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


class TrainSentencePiece(TrainedTokenizer):
    """A SentencePiece model trained on a sample of the training split."""

    implementation: ClassVar[str] = (
        "data_pipeline.tokenizer.sentencepiece_training:train_sentencepiece"
    )
    kind: Literal["train_sentencepiece"]
    vocab_size: Annotated[int, Field(ge=8, description="entries, special tokens included")] = 4096
    sample_bytes: Positive = Field(
        1 << 28, description="of text that the training looks at; it takes ten times the memory"
    )
    model_type: Literal["unigram", "bpe"] = "unigram"
    normalization: Literal["nmt_nfkc", "nmt_nfkc_cf", "nfkc", "nfkc_cf", "identity"] = Field(
        "nmt_nfkc",
        description=(
            "SentencePiece's rule; all but 'identity' also write a line end as a blank and several"
            " blanks as one"
        ),
    )
    character_coverage: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9995, description="share of the sample's characters that are pieces of their own"
    )
    byte_fallback: bool = Field(
        False, description="characters without a piece become their bytes, not unk_token"
    )
    dummy_prefix: bool = Field(True, description="a blank is put before each text")
    split_digits: bool = Field(False, description="every digit is a piece")
    eod_token: str = "</s>"
    bos_token: str = "<s>"
    unk_token: str = "<unk>"
    reserved_tokens: list[str] = Field(
        [], description="special tokens that get an id, such as those of fill-in-the-middle"
    )
    user_defined_symbols: list[str] = Field(
        [], description="pieces that are one token wherever a text holds them"
    )

    @property
    def special_tokens(self) -> list[str]:
        """The unknown piece and all special tokens, in the order of their ids, from 0."""
        pad = [self.pad_token] if self.pad_token is not None else []
        return [self.unk_token, self.bos_token, self.eod_token, *pad, *self.reserved_tokens]

    @model_validator(mode="after")
    def _symbols_have_room(self) -> TrainSentencePiece:
        symbols = [*self.special_tokens, *self.user_defined_symbols]
        if twice := [symbol for symbol in symbols if symbols.count(symbol) > 1]:
            raise ValueError(f"'{twice[0]}' is named twice: every token has one name")
        if "" in symbols:
            raise ValueError("a token has an empty name: give it one, or leave it out")
        needed = len(symbols) + 256 * self.byte_fallback
        if self.vocab_size <= needed:
            raise ValueError(
                f"vocab_size must be larger than {needed}: special tokens, symbols and, for"
                " byte_fallback, 256 bytes come first"
            )
        return self


class TokenizerFile(ExistingTokenizer):
    """An existing ``tokenizer.json``, or the ``tokenizer.model`` of another data folder."""

    implementation: ClassVar[str] = "data_pipeline.tokenizer.configured:read_tokenizer_json"
    kind: Literal["file"]
    path: str


class SentencePieceFile(ExistingTokenizer):
    """A SentencePiece ``.model``: an equal ``tokenizer.json`` if there is one, else itself."""

    implementation: ClassVar[str] = "data_pipeline.tokenizer.configured:read_sentencepiece"
    kind: Literal["sentencepiece"]
    path: str


class TiktokenFile(ExistingTokenizer):
    """A tiktoken vocabulary (base64 tokens and ranks), converted to an equal ``tokenizer.json``."""

    implementation: ClassVar[str] = "data_pipeline.tokenizer.configured:read_tiktoken"
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
    """A tokenizer of the package mistral-common, such as tekken_240911.json.

    SentencePiece models such as tokenizer.model.v3 are in it too.
    """

    implementation: ClassVar[str] = "data_pipeline.tokenizer.configured:read_mistral"
    kind: Literal["mistral"]
    name: str
