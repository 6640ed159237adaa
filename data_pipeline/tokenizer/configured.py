"""The tokenizer that a recipe's ``data.tokenizer`` names."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.config import MistralFile, SentencePieceFile, TiktokenFile, TokenizerFile
from data_pipeline.tokenizer.tokenizer import Tokenizer, read_file
from pretrain.core.errors import ConfigError


def load_configured(
    config: TokenizerFile | SentencePieceFile | TiktokenFile | MistralFile,
) -> Tokenizer:
    """Reads a tokenizer of any kind and turns it into an equal ``tokenizer.json``.

    Raises:
        ConfigError: where ``vocab_size`` is not that of the tokenizer, or a package that the kind
            needs is missing.
        DataError: where the file is missing or damaged, gives other ids than its own library as a
            ``tokenizer.json``, or lacks a token that the recipe names or needs.
    """
    match config:
        case TokenizerFile():
            content, origin = read_file(Path(config.path), "a tokenizer.json"), config.path
        case SentencePieceFile():
            from data_pipeline.tokenizer.sentencepiece_model import convert_sentencepiece

            content, origin = (
                convert_sentencepiece(
                    read_file(Path(config.path), "a SentencePiece .model"), config.path
                ),
                config.path,
            )
        case TiktokenFile():
            from data_pipeline.tokenizer.tiktoken_ranks import convert_tiktoken

            ranks = read_file(Path(config.path), "a tiktoken vocabulary")
            content, origin = (
                convert_tiktoken(ranks, config.path, config.pattern, config.special_tokens),
                config.path,
            )
        case MistralFile():
            from data_pipeline.tokenizer.mistral import convert_mistral

            content, origin = convert_mistral(config.name), f"mistral-common's {config.name}"
    tokenizer = Tokenizer(content, origin, config)
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise ConfigError(
            f"data.tokenizer.vocab_size is {config.vocab_size}, but {origin} has"
            f" {tokenizer.vocab_size} entries: leave it out or say {tokenizer.vocab_size}"
        )
    return tokenizer
