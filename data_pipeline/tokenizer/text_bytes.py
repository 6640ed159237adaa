"""Counts the bytes of text behind token ids, for bits per byte."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import decoders

from data_pipeline.tokenizer.reference import Reference, TokenizersReference
from data_pipeline.tokenizer.tokenizer import Tokenizer

# Longer documents are decoded in parts, which may change their size by a few bytes at each cut.
DECODED_AT_ONCE = 1 << 20


class TextBytes:
    """Counts the UTF-8 bytes of documents. Special tokens have no text.

    Tokens of a byte-level tokenizer have a fixed number of bytes each, so that a table is
    exact; documents of any other are decoded.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._reference = tokenizer.reference
        self._table = _table(tokenizer.reference)

    def count(self, tokens: np.ndarray, lengths: Sequence[int]) -> int:
        """Return the bytes of whole documents.

        They are given as token ids back to back [n], each below the vocabulary's size, and the
        length of each document.
        """
        if self._table is not None:
            return int(self._table[tokens].sum(dtype=np.int64))
        texts = []
        start = 0
        for length in lengths:
            document = tokens[start : start + length].tolist()
            texts += [
                document[first : first + DECODED_AT_ONCE]
                for first in range(0, length, DECODED_AT_ONCE)
            ]
            start += length
        decoded = self._reference.decode(texts, skip_special_tokens=True)
        return sum(len(text.encode("utf-8")) for text in decoded)


def _table(reference: Reference) -> np.ndarray | None:
    """Return the bytes of each token id, int32 [vocab_size]; None if it is not byte-level.

    A byte-level vocabulary spells each byte as one character.
    """
    if not (
        isinstance(reference, TokenizersReference)
        and isinstance(reference.backend.decoder, decoders.ByteLevel)
    ):
        return None
    table = np.zeros(max(reference.vocabulary.values()) + 1, dtype=np.int32)
    for token, number in reference.vocabulary.items():
        table[number] = len(token)
    for token, number in reference.added_tokens.items():
        is_special = token in reference.special_tokens
        table[number] = 0 if is_special else len(token.encode("utf-8"))
    return table
