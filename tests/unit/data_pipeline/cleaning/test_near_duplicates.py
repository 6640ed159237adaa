"""Band hashes: near duplicates share one as often as theory says, on every machine and however
texts are grouped.
"""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from data_pipeline.cleaning.config import NearDuplicates
from data_pipeline.cleaning.near_duplicates import (
    algorithm,
    bands_and_rows,
    chance_of_match,
    minhash_bands,
    minhash_bands_batch,
    num_bands,
    shingles,
)
from tests.support.paths import ROOT

DEFAULT = NearDuplicates()
PROSE = " ".join(random.Random(5).choices([f"term{number}" for number in range(2000)], k=400))


def share_a_band(left: str, right: str, config: NearDuplicates = DEFAULT) -> bool:
    return bool((minhash_bands(left, config) == minhash_bands(right, config)).any())


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("num_permutations", [64, 128, 256])
def test_bands_use_the_signature_and_turn_at_the_threshold(
    threshold: float, num_permutations: int
) -> None:
    bands, rows = bands_and_rows(threshold, num_permutations)
    assert bands * rows <= num_permutations < (bands + 1) * rows
    assert chance_of_match(threshold, bands, rows) == pytest.approx(0.5, abs=0.16)
    assert (
        num_bands(NearDuplicates(threshold=threshold, num_permutations=num_permutations)) == bands
    )


def test_the_default_turns_where_its_description_says() -> None:
    assert bands_and_rows(0.8, 128) == (10, 12)
    assert [round(chance_of_match(similarity, 10, 12), 2) for similarity in (0.57, 0.8, 0.9)] == [
        0.01,
        0.51,
        0.96,
    ]


@pytest.mark.parametrize("similarity", [0.6, 0.7, 0.8, 0.9])
def test_pairs_of_known_similarity_match_as_often_as_the_curve_says(similarity: float) -> None:
    pairs, words = 400, 300
    config = NearDuplicates(shingle_words=1)
    source = random.Random(int(similarity * 100))
    shared = round(words * similarity)
    texts = []
    for _ in range(pairs):
        drawn = [f"{source.getrandbits(64):x}" for _ in range(words)]
        # Each text has the shared words and half of the others, so the sets' Jaccard similarity is
        # shared / words.
        half = (words - shared) // 2
        texts += [
            " ".join(drawn[: shared + half]),
            " ".join(drawn[:shared] + drawn[shared + half :]),
        ]
    left, right = (set(texts[place].split()) for place in (0, 1))
    assert len(left & right) / len(left | right) == pytest.approx(similarity, abs=0.01)
    bands = minhash_bands_batch(texts, config).reshape(pairs, 2, -1)
    measured = (bands[:, 0] == bands[:, 1]).any(axis=1).mean()
    expected = chance_of_match(
        similarity, *bands_and_rows(config.threshold, config.num_permutations)
    )
    # Four standard deviations of the mean of 400 draws, and a little for the signature's own
    # correlation.
    assert measured == pytest.approx(
        expected, abs=4 * (expected * (1 - expected) / pairs) ** 0.5 + 0.02
    )


def test_a_typo_is_found_and_an_unrelated_text_is_not() -> None:
    source = random.Random(3)
    vocabulary = [f"term{number}" for number in range(2000)]
    found = unrelated = 0
    for _ in range(50):
        words = source.choices(vocabulary, k=400)
        typo = [*words]
        typo[source.randrange(400)] = "tpyo"
        found += share_a_band(" ".join(words), " ".join(typo))
        unrelated += share_a_band(" ".join(words), " ".join(source.choices(vocabulary, k=400)))
    assert found >= 49
    assert unrelated == 0


def test_case_and_punctuation_make_no_difference() -> None:
    assert (
        minhash_bands(PROSE, DEFAULT) == minhash_bands(PROSE.upper().replace(" ", ", "), DEFAULT)
    ).all()
    assert (
        minhash_bands(PROSE, DEFAULT) != minhash_bands(" ".join(reversed(PROSE.split())), DEFAULT)
    ).all()


def test_short_texts_match_only_where_their_words_are_equal() -> None:
    assert share_a_band("Hello, world", "hello world!")
    assert not share_a_band("hello world", "hello there")
    assert not share_a_band("one two three four", "one two three")
    assert not share_a_band("!!!", "???") and share_a_band("!!!", "!!!")
    assert len(shingles("a b c", 5)) == len(shingles("a b c d e", 5)) == len(shingles("?", 5)) == 1
    assert len(shingles("a b c d e f", 5)) == 2


def test_a_batch_gives_what_each_text_gives_alone() -> None:
    texts = [PROSE, "short", "!!!", PROSE[:200], "日本語のテキスト"]
    batch = minhash_bands_batch(texts, DEFAULT)
    assert batch.dtype == np.uint64 and batch.shape == (5, 10)
    assert (batch == np.stack([minhash_bands(text, DEFAULT) for text in texts])).all()
    assert minhash_bands_batch([], DEFAULT).shape == (0, 10)


def test_hashes_differ_between_the_bands_of_a_text_of_one_shingle() -> None:
    assert len(set(minhash_bands("a", NearDuplicates(num_permutations=64)).tolist())) == num_bands(
        NearDuplicates(num_permutations=64)
    )


def test_bands_are_the_same_in_every_process_and_version() -> None:
    """Recorded once: another value means that keys of older builds can no longer be compared, so
    ``algorithm`` must change with it.
    """
    assert algorithm() == "rensa RMinHash 2, seed 1"
    recorded = [16927680967994317707, 16357271764288123033, 4894363724610466434]
    assert (
        minhash_bands("the quick brown fox jumps over the lazy dog", DEFAULT)[:3].tolist()
        == recorded
    )
    program = (
        "from data_pipeline.cleaning.near_duplicates import minhash_bands; from"
        " data_pipeline.cleaning.config import NearDuplicates; print(minhash_bands('the quick brown"
        " fox jumps over the lazy dog', NearDuplicates())[:3].tolist())"
    )
    output = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert output.stdout.strip() == str(recorded)
