"""MinHash signatures of texts, cut into bands that near duplicates share (Broder 1997.

Leskovec et al. 2014, chapter 3; Lee et al. 2022).

Two texts whose sets of shingles have the Jaccard similarity s share at least one of b bands of r
values with a chance of 1 - (1 - s^r)^b. The signature is rensa's R-MinHash, which follows the fast
similarity sketching of Dahlgaard et al. 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.cleaning.config import NearDuplicates
from data_pipeline.cleaning.ngrams import hash_ngrams, hash_words, words_of

SEED = 1


def algorithm() -> str:
    """Return what the bands depend on in addition to the text and the section.

    Bands of different algorithms must not be compared.
    """
    from rensa import RMinHash

    return f"rensa RMinHash {RMinHash.ALGORITHM_VERSION}, seed {SEED}"


def chance_of_match(similarity: float, bands: int, rows: int) -> float:
    """The chance that texts of a Jaccard similarity share a band."""
    return 1.0 - (1.0 - similarity**rows) ** bands


@lru_cache
def bands_and_rows(threshold: float, num_permutations: int) -> tuple[int, int]:
    """Return the number of bands, and of rows in each.

    They use the whole signature and find pairs at the threshold with a chance nearest to one half.

    For 0.8 and 128 values they are 10 bands of 12 rows, which find 1 % of the pairs at 0.57, 51 %
    at 0.8 and 96 % at 0.9.
    """

    def distance(rows: int) -> float:
        return abs(chance_of_match(threshold, num_permutations // rows, rows) - 0.5)

    rows = min(range(1, num_permutations + 1), key=distance)
    return num_permutations // rows, rows


def num_bands(config: NearDuplicates) -> int:
    """Return the number of bands of a signature."""
    return bands_and_rows(config.threshold, config.num_permutations)[0]


def shingles(text: str, size: int) -> NDArray[np.uint64]:
    """Hashes of each ``size`` words in a row, [n >= 1].

    A text of fewer words is one shingle of all of them, and one without any word is a shingle by
    itself: such short texts are near duplicates only if their words are equal.
    """
    words = words_of(text)
    if not words:
        return np.array([xxhash.xxh3_64_intdigest(text.encode("utf-8"))], np.uint64)
    return hash_ngrams(hash_words(words), min(size, len(words)))


def minhash_bands(text: str, config: NearDuplicates) -> NDArray[np.uint64]:
    """The hash of each band of one text's signature, uint64 [bands]."""
    return minhash_bands_batch([text], config)[0]


def minhash_bands_batch(texts: Sequence[str], config: NearDuplicates) -> NDArray[np.uint64]:
    """The hash of each band of each text's signature, uint64 [texts, bands].

    The hash includes the number of the band, so equal hashes are of the same band.

    A pure function of the text, the section and :func:`algorithm`. All shingles of the texts are
    held at once, about 1.5 bytes a byte of text.
    """
    from rensa import RMinHash

    bands, rows = bands_and_rows(config.threshold, config.num_permutations)
    if not texts:
        return np.zeros((0, bands), np.uint64)
    of_texts = [shingles(text, config.shingle_words) for text in texts]
    offsets = np.zeros(len(texts) + 1, np.uint64)
    np.cumsum([len(hashes) for hashes in of_texts], out=offsets[1:])
    signatures = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(of_texts), offsets, config.num_permutations, SEED
    ).to_rows()
    values = np.array(signatures, "<u4")[:, : bands * rows].reshape(len(texts), bands, rows)
    keys = [
        xxhash.xxh3_64_intdigest(values[text, band], band)
        for text in range(len(texts))
        for band in range(bands)
    ]
    return np.array(keys, np.uint64).reshape(len(texts), bands)
