"""Words of a text and hashes of its n-grams, for decontamination and near duplicates."""

from __future__ import annotations

import re

import numpy as np
import xxhash
from numpy.typing import NDArray

# White space and punctuation of ASCII separate words; other bytes of UTF-8 are handled before.
SEPARATORS = bytes(byte if byte >= 128 or re.match(r"\w", chr(byte)) else 32 for byte in range(256))
OTHER_SEPARATORS = re.compile(r"[^\w\x00-\x7f]+")
# Kana and Han, which are written without spaces: each character counts as a word.
SINGLE_CHARACTER_WORDS = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def words_of(text: str) -> list[bytes]:
    """Return the runs of letters, digits and '_' in lower case, as UTF-8.

    Punctuation and white space separate them.
    """
    text = text.lower()
    if not text.isascii():
        text = OTHER_SEPARATORS.sub(" ", SINGLE_CHARACTER_WORDS.sub(r" \1 ", text))
    return text.encode("utf-8").translate(SEPARATORS).split()


def hash_words(words: list[bytes]) -> NDArray[np.uint64]:
    """The 64-bit XXH3 of each word, [words]."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, words), np.uint64, len(words))


def hash_ngrams(word_hashes: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each ``size`` consecutive words: [words - size + 1], or [0].

    It is a polynomial of the words' hashes modulo 2^64.
    """
    count = max(len(word_hashes) - size + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for offset in range(size):
        hashes = hashes * MULTIPLIER + word_hashes[offset : offset + count]
    return hashes
