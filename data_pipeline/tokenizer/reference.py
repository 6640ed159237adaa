"""The libraries whose ids are the right ones, tokenizers and sentencepiece, in one interface."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import tokenizers
from tokenizers import models

from data_pipeline.tokenizer.files import JSON_NAME
from data_pipeline.tokenizer.patterns import cut_before_white_space, may_be_cut
from pretrain.core.errors import DataError

logger = logging.getLogger(__name__)


class Reference(Protocol):
    """A tokenizer in the library that its file was made for; any number of threads may read it.

    Attributes:
        engine: the name of the engine that is this library.
        file_name: what its file is called in data folders, checkpoints and exports.
        vocabulary: the id of every token by its spelling.
        special_tokens: the ids of tokens that no text holds unless they are parsed.
        added_tokens: the ids of these and of other tokens that are looked for in a text as a whole.
        unknown_token: what stands for text without a token; None if nothing does.
        end_id, begin_id, pad_id: what the file itself says of documents; None if it says nothing.
    """

    engine: str
    file_name: str
    vocabulary: dict[str, int]
    special_tokens: dict[str, int]
    added_tokens: dict[str, int]
    unknown_token: str | None
    end_id: int | None
    begin_id: int | None
    pad_id: int | None

    def pieces(self, text: str) -> Iterator[str]:
        """Yield parts of a text that encode to the same tokens as the whole."""

    def segmented(self, text: str) -> str:
        """Return a text as the model cuts it into tokens, whatever blanks are spelled with.

        It has the blanks that were put around the text, and lacks those that were removed.
        """

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""

    def decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        """Return the texts of ids; those that are no token's have no text."""


class TokenizersReference:
    """A ``tokenizer.json`` in the tokenizers library.

    Attributes:
        backend: the library's tokenizer, without truncation, padding and dropout.
    """

    engine = "tokenizers"
    file_name = JSON_NAME
    unknown_token: str | None = None
    end_id: int | None = None
    begin_id: int | None = None
    pad_id: int | None = None

    def __init__(self, content: bytes, origin: str, parse_special_tokens: bool) -> None:
        self.backend = _read_json(content, origin)
        # A text that spells out a special token must not end its document there.
        self.backend.encode_special_tokens = not parse_special_tokens
        self.vocabulary: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        added = self.backend.get_added_tokens_decoder()
        self.added_tokens = {token.content: number for number, token in added.items()}
        self.special_tokens = {
            token.content: number for number, token in added.items() if token.special
        }
        self._may_be_cut = may_be_cut(self.backend) and not (
            parse_special_tokens
            # Such a token reaches over white space, at which texts are cut.
            and any(
                token.lstrip or token.rstrip or any(map(str.isspace, token.content))
                for token in added.values()
            )
        )

    def pieces(self, text: str) -> Iterator[str]:
        """See :meth:`Reference.pieces`."""
        return cut_before_white_space(text) if self._may_be_cut else iter([text])

    def segmented(self, text: str) -> str:
        """See :meth:`Reference.segmented`."""
        backend = self.backend
        normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        if backend.pre_tokenizer is None:
            return normal
        return "".join(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See :meth:`Reference.encode`."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        """See :meth:`Reference.decode`."""
        found: list[str] = self.backend.decode_batch(
            [list(row) for row in rows], skip_special_tokens=skip_special_tokens
        )
        return found


def failure(error: BaseException) -> str:
    """Return the report of a native library on one line; a panic of Rust code counts.

    What is not the library's failure, such as an interrupt, is raised again.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return " ".join(str(error).split())[:300] or type(error).__name__


_with_dropout: set[str] = set()


def _read_json(content: bytes, origin: str) -> tokenizers.Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except BaseException as error:
        # The library raises bare Exception, and its panics are only BaseException.
        raise DataError(
            f"{origin} is not a tokenizer that the tokenizers library can read ({failure(error)}):"
            " give a tokenizer.json"
        ) from None
    library.no_truncation()
    library.no_padding()
    model: Any = library.model
    if isinstance(model, models.BPE) and model.dropout is not None:
        # With it the same text has other tokens each time, so that no build could be repeated.
        if origin not in _with_dropout:
            logger.warning(
                "%s has a dropout of %g, which is off while texts are encoded",
                origin,
                model.dropout,
            )
        _with_dropout.add(origin)
        model.dropout = None
    return library
