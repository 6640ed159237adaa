"""Fill in the middle: rates, orders and cuts are as configured, and no character is lost."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from data_pipeline.cleaning.config import FillInTheMiddle
from data_pipeline.tokenizer.config import TrainBPE, TrainSentencePiece
from data_pipeline.tokenizer.fill_in_the_middle import FillInTheMiddleTransform, open_transform
from data_pipeline.tokenizer.sentencepiece_model import convert_sentencepiece
from data_pipeline.tokenizer.sentencepiece_training import train_sentencepiece
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tokenizer.training import train_bpe
from pretrain.core.errors import ConfigError, DataError

IDS = {"<|fim_prefix|>": 7, "<|fim_middle|>": 8, "<|fim_suffix|>": 9}
TEXT = "0123456789abcdefghij"


def transform(**fields: float) -> FillInTheMiddleTransform:
    return FillInTheMiddleTransform(FillInTheMiddle.model_validate(fields), IDS.get)


def parts(pieces: list[str | int]) -> tuple[str, str, str]:
    """Prefix, middle and suffix; an SPM document's middle is empty here, as nothing marks where it
    begins.
    """
    match pieces:
        case [7, str(prefix), 9, str(suffix), 8, str(middle)]:
            return prefix, middle, suffix
        case [7, 9, str(suffix), 8, str(both)]:
            return both, "", suffix
    raise AssertionError(f"in no known order: {pieces}")


@given(st.text(min_size=3), st.integers(0, 2**128 - 1), st.integers(0, 2**32))
def test_the_pieces_join_to_the_text_in_either_order(text: str, digest: int, seed: int) -> None:
    for spm_rate in (0.0, 1.0):
        pieces = transform(rate=1, spm_rate=spm_rate).split(text, digest, seed)
        assert pieces is not None and len(pieces) == (5 if spm_rate else 6)
        assert "".join(parts(pieces)) == text


def test_rates_are_those_of_the_recipe() -> None:
    digests = [random.Random(number).getrandbits(128) for number in range(10_000)]
    results = [transform(rate=0.6, spm_rate=0.3).split(TEXT, digest, 1) for digest in digests]
    changed = [pieces for pieces in results if pieces is not None]
    # Four standard deviations of 10,000 and of 6,000 draws.
    assert len(changed) / len(results) == pytest.approx(0.6, abs=0.02)
    assert sum(len(pieces) == 5 for pieces in changed) / len(changed) == pytest.approx(
        0.3, abs=0.025
    )
    assert all(transform(rate=0).split(TEXT, digest, 1) is None for digest in digests[:100])


def test_cuts_are_uniform_over_the_characters() -> None:
    always = transform(rate=1, spm_rate=0)
    lengths = [0, 0, 0]
    ends = [0] * (len(TEXT) + 1)
    for number in range(6000):
        pieces = always.split(TEXT, random.Random(number).getrandbits(128), 1)
        assert pieces is not None
        found = parts(pieces)
        lengths = [total + len(part) for total, part in zip(lengths, found, strict=True)]
        ends[len(found[0])] += 1
        ends[len(found[0]) + len(found[1])] += 1
    assert [length / 6000 / len(TEXT) for length in lengths] == pytest.approx([1 / 3] * 3, abs=0.02)
    expected = 12_000 / len(ends)
    assert all(count == pytest.approx(expected, abs=5 * expected**0.5) for count in ends)


def test_the_choice_depends_on_digest_and_seed_alone() -> None:
    first = [transform().split(TEXT, digest, 3) for digest in range(200)]
    assert first == [transform().split(TEXT, digest, 3) for digest in range(200)]
    assert first != [transform().split(TEXT, digest, 4) for digest in range(200)]
    assert first != [transform().split(TEXT, digest + 1000, 3) for digest in range(200)]
    # Recorded, because a build must be the same on every version of Python.
    assert transform(rate=1, spm_rate=0).split(TEXT, 12345, 3) == [
        7,
        "01234567",
        9,
        "efghij",
        8,
        "89abcd",
    ]


def test_short_texts_stay() -> None:
    assert transform(rate=1).split("ab", 1, 1) is None
    assert transform(rate=1).split("abc", 1, 1) is not None


@pytest.mark.parametrize("missing", IDS)
def test_a_tokenizer_without_a_sentinel_is_refused(missing: str) -> None:
    left = {name: number for name, number in IDS.items() if name != missing}
    with pytest.raises(
        DataError, match=rf"no token '{missing}'.*reserved_tokens".replace("|", r"\|")
    ):
        FillInTheMiddleTransform(FillInTheMiddle(), left.get)


def test_an_id_of_zero_is_an_id() -> None:
    zero = FillInTheMiddleTransform(
        FillInTheMiddle(rate=1, spm_rate=0), {**IDS, "<|fim_prefix|>": 0}.get
    )
    assert (zero.split(TEXT, 1, 1) or [None])[0] == 0


SAMPLE = [f"the router sends token {number} to two of the experts" for number in range(200)]
PRESENT = FillInTheMiddle(rate=1, spm_rate=0.5, sources=["code"])
EXACT = {"normalization": "identity", "dummy_prefix": False}
ADDS, REMOVES = "adds a blank to each text", "removes blanks at the ends of each text"


def model(**fields: Any) -> Tokenizer:
    fields = {"vocab_size": 120, "reserved_tokens": list(IDS)} | fields
    return train_sentencepiece(SAMPLE, TrainSentencePiece(kind="train_sentencepiece", **fields))


def converted(**fields: Any) -> Tokenizer:
    """A BPE model as its ``tokenizer.json``."""
    fields = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True} | fields
    content = convert_sentencepiece(model(**fields).content, "the model")
    assert content.startswith(b"{")
    return Tokenizer(content, "the converted model")


def byte_level(**steps: Any) -> Tokenizer:
    """A ``tokenizer.json`` with other steps before its model."""
    config = TrainBPE(vocab_size=300, reserved_tokens=list(IDS))
    library = tokenizers.Tokenizer.from_str(train_bpe(SAMPLE, config).content.decode())
    for name, step in steps.items():
        setattr(library, name, step)
    return Tokenizer(library.to_str().encode(), "the file")


def open_files(name: str) -> Tokenizer:
    level, meta = pre_tokenizers.ByteLevel, pre_tokenizers.Metaspace
    match name:
        case "byte-level":
            return byte_level()
        case "byte-level, prefix space":
            return byte_level(pre_tokenizer=level(add_prefix_space=True))
        case "Metaspace":
            return byte_level(pre_tokenizer=meta(prepend_scheme="first"))
        case "Metaspace, never":
            return byte_level(pre_tokenizer=meta(prepend_scheme="never"))
        case "Prepend":
            return byte_level(normalizer=normalizers.Prepend("_"))
        case "Strip":
            return byte_level(normalizer=normalizers.Strip(left=False))
        case _:
            # Blanks are no part of any token, so that cuts lose none.
            return byte_level(pre_tokenizer=pre_tokenizers.Whitespace())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ADDS),
        ({"normalization": "identity"}, ADDS),
        ({"normalization": "identity", "model_type": "bpe"}, ADDS),
        ({"dummy_prefix": False}, REMOVES),
    ],
)
def test_a_model_that_changes_the_blanks_of_parts_is_refused(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=rf"the trained tokenizer {words}.*dummy_prefix=false"):
        open_transform(PRESENT, "code", model(**fields))


def test_a_converted_model_that_puts_a_blank_before_each_part_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"the converted model {ADDS}.*another tokenizer"):
        open_transform(PRESENT, "code", converted(normalization="identity"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("byte-level, prefix space", ADDS),
        ("Metaspace", ADDS),
        ("Prepend", ADDS),
        ("Strip", REMOVES),
    ],
)
def test_a_file_that_changes_the_blanks_of_parts_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"the file {words}"):
        open_transform(PRESENT, "code", open_files(name))


@pytest.mark.parametrize("name", ["byte-level", "Metaspace, never", "Whitespace"])
def test_a_file_that_leaves_blanks_alone_is_taken(name: str) -> None:
    assert open_transform(PRESENT, "code", open_files(name)) is not None


@pytest.mark.parametrize("make", [model, converted])
def test_the_tokens_of_all_parts_join_to_the_document(make: Any) -> None:
    tokenizer = make(**EXACT)
    transform = open_transform(PRESENT, "code", tokenizer)
    assert transform is not None
    text = "  the router sends  token 7 to two experts "
    spelled = {tokenizer.token_id(name): number for name, number in IDS.items()}
    for digest in range(300):
        pieces = transform.split(text, digest, 1)
        assert pieces is not None
        read = [
            spelled[piece]
            if isinstance(piece, int)
            else tokenizer.decode(tokenizer.encode([piece])[0].tolist())
            for piece in pieces
        ]
        assert "".join(parts(read)) == text


def test_other_sources_keep_any_tokenizer() -> None:
    assert open_transform(PRESENT, "books", model()) is None
    assert open_transform(None, "code", model()) is None
