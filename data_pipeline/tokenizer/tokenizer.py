"""A tokenizer: its file, and which of its tokens begin and end a document."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.tokenizer.config import TokenPolicy
from data_pipeline.tokenizer.files import is_sentencepiece
from data_pipeline.tokenizer.reference import Reference, TokenizersReference
from data_pipeline.tokenizer.sentencepiece_reference import SentencePieceReference
from pretrain.core.errors import DataError

EOD_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")
BOS_TOKENS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>")
PAD_TOKENS = (
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|padding|>",
    "<|finetune_right_pad_id|>",
    "<｜▁pad▁｜>",
)
LARGEST_ID = (1 << 31) - 1


class Tokenizer:
    """A loaded ``tokenizer.json`` or SentencePiece model.

    Every engine is measured against its :meth:`encode`, which is that of the tokenizers library or
    of the sentencepiece library.

    Args:
        content: the bytes of the file.
        origin: where it came from, for errors.
        policy: which tokens begin and end a document. Tokens that it leaves out are those that the
            file itself names, or are searched among well-known names.

    Attributes:
        content: the file's bytes; ``sha256`` is their checksum.
        reference: the tokenizer in its own library.
        vocab_size: the largest id + 1.
        eod_id: id of the token that ends a document. A tokenizer without one has its bos_id or else
            its pad_id here, and None without these, unless the policy appends the token.
        bos_id, pad_id: ids of the tokens that begin a document and fill a sequence; None if there
            is none.
        append_eod, prepend_bos: whether those tokens are written around each document.
        parse_special_tokens: whether special tokens that a text spells out become their ids.

    Raises:
        ConfigError: if a package is missing that reads the tokenizer.
        DataError: if the bytes are no tokenizer, or it lacks a token that the policy names or
            needs.
    """

    def __init__(self, content: bytes, origin: str, policy: TokenPolicy | None = None) -> None:
        policy = policy or TokenPolicy()
        self.content = content
        self.origin = origin
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.parse_special_tokens = policy.parse_special_tokens
        self.reference: Reference = (
            SentencePieceReference(content, origin, self.parse_special_tokens)
            if is_sentencepiece(content)
            else TokenizersReference(content, origin, self.parse_special_tokens)
        )
        self.vocab_size = max(self.reference.vocabulary.values(), default=-1) + 1
        if not 0 < self.vocab_size <= LARGEST_ID:
            raise DataError(
                f"{origin} has no tokens, or ids of 2^31 and more: give a tokenizer with a"
                " vocabulary"
            )
        reference = self.reference
        eod_id = self._find("eod_token", policy.eod_token, reference.end_id, EOD_TOKENS)
        self.bos_id = self._find("bos_token", policy.bos_token, reference.begin_id, BOS_TOKENS)
        self.pad_id = self._find("pad_token", policy.pad_token, reference.pad_id, PAD_TOKENS)
        self.append_eod = policy.append_eod
        self.prepend_bos = policy.prepend_bos
        if self.prepend_bos and self.bos_id is None:
            raise DataError(
                f"{origin} has none of the tokens {', '.join(BOS_TOKENS)}: name the one that begins"
                " a document with bos_token"
            )
        if self.append_eod and eod_id is None:
            raise DataError(
                f"{origin} has no end-of-document token for append_eod: name it with eod_token, use"
                f" a tokenizer with one of {', '.join(EOD_TOKENS)}, or set append_eod to false"
            )
        found = [token for token in (eod_id, self.bos_id, self.pad_id) if token is not None]
        self.eod_id = found[0] if found else None

    def _find(
        self, field: str, wanted: str | None, named: int | None, known: Sequence[str]
    ) -> int | None:
        """Return the id of the token that the policy names, the file, or of a well-known one."""
        if wanted is None:
            ids = [named, *map(self.token_id, known)]
            return next((found for found in ids if found is not None), None)
        if (found := self.token_id(wanted)) is None:
            candidates = self.reference.added_tokens or self.reference.vocabulary
            near = difflib.get_close_matches(wanted, list(candidates), n=3, cutoff=0.3)
            hint = f", but {', '.join(near)}" if near else ""
            raise DataError(f"{self.origin} has no token '{wanted}'{hint}: correct {field}")
        return found

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry; None if there is no such entry."""
        return self.reference.vocabulary.get(token)

    def pieces(self, text: str) -> Iterator[str]:
        """Yield parts of a long text that encode to the same tokens as the whole.

        They allow parallel work in bounded memory.
        """
        return self.reference.pieces(text)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
        """Token ids [n] int64 of each text, on all cores, without tokens around it."""
        pieces = [list(self.pieces(text)) for text in texts]
        rows = iter(self.reference.encode([piece for parts in pieces for piece in parts]))
        return [
            np.concatenate([np.array(next(rows), dtype=np.int64) for _ in parts])
            for parts in pieces
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are spelled out."""
        return self.reference.decode([ids], skip_special_tokens=False)[0]


def load_tokenizer(path: Path, policy: TokenPolicy | None = None) -> Tokenizer:
    """Reads a ``tokenizer.json`` or a SentencePiece model.

    Raises:
        DataError: if it is missing, unreadable, or lacks a token that the policy names or needs.
    """
    return Tokenizer(
        read_file(path, "a tokenizer.json or a SentencePiece .model"), str(path), policy
    )


def read_file(path: Path, expected: str) -> bytes:
    """The bytes of a file, or a DataError that says what was expected there."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the tokenizer {path} cannot be read: {error.strerror}; give the path of {expected}"
        ) from None
