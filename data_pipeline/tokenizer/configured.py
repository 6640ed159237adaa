"""Loads the tokenizer that a recipe's ``data.tokenizer`` names."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.tokenizer.config import (
    ExistingTokenizer,
    MistralFile,
    SentencePieceFile,
    TiktokenFile,
    TokenizerConfig,
    TokenizerFile,
    TrainedTokenizer,
)
from data_pipeline.tokenizer.mistral import convert_mistral
from data_pipeline.tokenizer.sentencepiece_model import convert_sentencepiece
from data_pipeline.tokenizer.tiktoken_ranks import convert_tiktoken
from data_pipeline.tokenizer.tokenizer import Tokenizer, read_file
from pretrain.core.errors import ConfigError
from pretrain.core.registry import kind_name


def check_kind(config: TokenizerConfig) -> None:
    """Refuse a plugin's kind that is neither read from a file nor trained.

    Raises:
        ConfigError: if it is not.
    """
    if not isinstance(config, (ExistingTokenizer, TrainedTokenizer)):
        kind = type(config)
        raise ConfigError(
            f"the tokenizer kind '{kind_name(kind)}' is neither loaded nor trained: make"
            f" {kind.__module__}.{kind.__qualname__} a class below ExistingTokenizer or"
            " TrainedTokenizer"
        )


def load_configured(config: ExistingTokenizer) -> Tokenizer:
    """Read a tokenizer of any kind as an equal ``tokenizer.json``.

    Raises:
        ConfigError: if ``vocab_size`` is not that of the tokenizer, or a package that the kind
            needs is missing.
        DataError: if the file is missing or damaged, if it has other ids as a ``tokenizer.json``
            than in its own library, or if it lacks a token that the recipe names or needs.
    """
    content, origin = config.implementing_class()(config)
    tokenizer = Tokenizer(content, origin, config)
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise ConfigError(
            f"data.tokenizer.vocab_size is {config.vocab_size}, but {origin} has"
            f" {tokenizer.vocab_size} entries: leave it out or say {tokenizer.vocab_size}"
        )
    return tokenizer


def read_tokenizer_json(config: TokenizerFile) -> tuple[bytes, str]:
    """Return the content and the path of an existing ``tokenizer.json``."""
    return read_file(Path(config.path), "a tokenizer.json"), config.path


def read_sentencepiece(config: SentencePieceFile) -> tuple[bytes, str]:
    """Return a SentencePiece model as a ``tokenizer.json``, and its path."""
    content = read_file(Path(config.path), "a SentencePiece .model")
    return convert_sentencepiece(content, config.path), config.path


def read_tiktoken(config: TiktokenFile) -> tuple[bytes, str]:
    """Return a tiktoken vocabulary as a ``tokenizer.json``, and its path."""
    content = read_file(Path(config.path), "a tiktoken vocabulary")
    converted = convert_tiktoken(content, config.path, config.pattern, config.special_tokens)
    return converted, config.path


def read_mistral(config: MistralFile) -> tuple[bytes, str]:
    """Return a tokenizer of mistral-common as a ``tokenizer.json``, and its name for errors."""
    return convert_mistral(config.name), f"mistral-common's {config.name}"
