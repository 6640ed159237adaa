"""Counts the bytes of text behind token ids, for bits per byte."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from data_pipeline.tokenizer.tokenizer import Tokenizer

# Longer documents are decoded in parts, which may change their size by a few bytes at each cut.
DECODED_AT_ONCE = 1 << 20


class TextBytes:
    """Counts the UTF-8 bytes of documents. Special tokens have no text.

    Tokens of a byte-level tokenizer have a fixed number of bytes each, so that a table is
    exact; documents of any other are decoded.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._library = tokenizer.reference
        decoder = json.loads(tokenizer.content).get("decoder") or {}
        self._table = _table(tokenizer) if decoder.get("type") == "ByteLevel" else None

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
        decoded = self._library.decode_batch(texts, skip_special_tokens=True)
        return sum(len(text.encode("utf-8")) for text in decoded)


def _table(tokenizer: Tokenizer) -> np.ndarray:
    """Return the bytes of each token id: int32 [vocab_size].

    A byte-level vocabulary spells each byte as one character.
    """
    table = np.zeros(tokenizer.vocab_size, dtype=np.int32)
    for token, number in tokenizer.reference.get_vocab(with_added_tokens=True).items():
        table[number] = len(token)
    for number, added in tokenizer.reference.get_added_tokens_decoder().items():
        table[number] = 0 if added.special else len(added.content.encode("utf-8"))
    return table
