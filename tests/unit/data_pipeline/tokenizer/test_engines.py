"""Fast engines: an engine is taken only while its ids are those of the tokenizers library."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from data_pipeline.tokenizer import engine_choice, engines
from data_pipeline.tokenizer.agreement import first_difference, newer_unicode_texts, torture_texts
from data_pipeline.tokenizer.config import TrainBPE
from data_pipeline.tokenizer.engine_choice import CheckedEncoder, choose_engine
from data_pipeline.tokenizer.engines import ENGINE_NAMES, EngineUnavailableError, open_engine
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tokenizer.training import train_bpe
from pretrain.core.errors import ConfigError, DataError

TEXTS = [
    f"def f{number}(x):\n    return [x + {number}, 'é']  # größer\n\n" * 3 for number in range(60)
]
SPECIAL = "<|endoftext|>"
JSON_ENGINES = [name for name in ENGINE_NAMES if name != "sentencepiece"]
AWKWARD = [
    "",
    " ",
    "x" * 3000,
    f"a{SPECIAL}b",
    "\n" * 50,
    "1234567",
    "tail  ",
    "\x00\x1c\x85",
    "中文 e\u0301 👩\u200d👧",
]


def short_torture(tokens: Sequence[str] = ()) -> list[str]:
    return torture_texts(tokens)[::6] + [f"before{token}after" for token in tokens]


@pytest.fixture(autouse=True)
def less_torture(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "full" not in request.keywords:
        monkeypatch.setattr(engine_choice, "torture_texts", short_torture)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, TrainBPE(vocab_size=400))


def names(texts: Sequence[str]) -> list[str]:
    return [f"document {number}" for number in range(len(texts))]


@pytest.mark.parametrize("name", JSON_ENGINES)
def test_every_engine_gives_the_ids_of_the_tokenizers_library(
    name: str, tokenizer: Tokenizer
) -> None:
    texts = [*TEXTS[:5], *AWKWARD]
    ids, offsets = open_engine(name, tokenizer).encode_flat(texts)
    assert (ids.dtype, offsets.dtype, len(offsets), offsets[0], offsets[-1]) == (
        np.uint32,
        np.int64,
        len(texts) + 1,
        0,
        len(ids),
    )
    rows = np.split(ids, offsets[1:-1])
    assert all(
        np.array_equal(row, expected)
        for row, expected in zip(rows, tokenizer.encode(texts), strict=True)
    )
    assert tokenizer.eod_id not in ids


@pytest.mark.parametrize("name", JSON_ENGINES)
def test_every_engine_takes_an_empty_batch_and_empty_texts(name: str, tokenizer: Tokenizer) -> None:
    engine = open_engine(name, tokenizer)
    for texts in ([], [""], ["", ""]):
        ids, offsets = engine.encode_flat(texts)
        assert (ids.tolist(), offsets.tolist()) == ([], [0] * (len(texts) + 1))


def test_truncation_in_the_file_is_not_applied_by_any_engine(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer.content)
    content["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    truncating = Tokenizer(json.dumps(content).encode(), "truncating")
    for name in JSON_ENGINES:
        assert np.array_equal(
            open_engine(name, truncating).encode_flat(TEXTS[:1])[0], tokenizer.encode(TEXTS[:1])[0]
        )


@pytest.mark.parametrize(
    ("digits", "whitespace"),
    [
        ("as_words", "gpt2"),
        ("single", "runs"),
        *(
            pytest.param(*pair, marks=pytest.mark.full)
            for pair in (
                ("single", "gpt2"),
                ("triples", "gpt2"),
                ("as_words", "runs"),
                ("triples", "runs"),
            )
        ),
    ],
)
def test_a_fast_engine_is_chosen_for_trained_tokenizers(digits: Any, whitespace: Any) -> None:
    choice = choose_engine(
        train_bpe(TEXTS, TrainBPE(vocab_size=400, digits=digits, whitespace=whitespace)), TEXTS
    )
    assert choice.name in ("fastokens", "gigatoken") and choice.megabytes_per_second > 0
    assert set(choice.reasons) == set(ENGINE_NAMES) - {choice.name}
    assert "slower" in choice.reasons["tokenizers"]


def test_an_engine_with_one_other_token_is_not_chosen(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong:
        """Exact but for one text of the sample."""

        def __init__(self, tokenizer: Tokenizer) -> None:
            self._exact = engines._Tokenizers(tokenizer)

        def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            ids, offsets = self._exact.encode_flat(texts)
            if list(texts) == TEXTS:
                ids[offsets[7] + 3] += 1
            return ids, offsets

    for name in ("fastokens", "gigatoken", "tiktoken"):
        monkeypatch.setitem(engines._ENGINES, name, Wrong)
    choice = choose_engine(tokenizer, TEXTS)
    assert choice.name == "tokenizers"
    assert all(
        choice.reasons[name].startswith('its ids differ: text 7 ("def f7(x)')
        for name in ("fastokens", "gigatoken", "tiktoken")
    )
    assert choice.reasons["fastokens"].endswith("token 3")


def test_an_engine_that_finds_special_tokens_in_texts_is_not_chosen(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finding:
        def __init__(self, tokenizer: Tokenizer) -> None:
            self._tokenizer = Tokenizer(tokenizer.content, "finding")
            self._tokenizer.reference.backend.encode_special_tokens = False

        def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            return engines._Tokenizers(self._tokenizer).encode_flat(texts)

    for name in ("fastokens", "gigatoken", "tiktoken"):
        monkeypatch.setitem(engines._ENGINES, name, Finding)
    choice = choose_engine(tokenizer, TEXTS)
    assert choice.name == "tokenizers" and SPECIAL in choice.reasons["fastokens"]


def test_missing_packages_and_failing_engines_are_reasons(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        """What a panic of Rust code looks like from Python."""

    class Panicking:
        def __init__(self, tokenizer: Tokenizer) -> None: ...

        def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            raise PanicException("index out of bounds")

    monkeypatch.setitem(sys.modules, "fastokens", None)
    monkeypatch.setitem(engines._ENGINES, "gigatoken", Panicking)
    choice = choose_engine(tokenizer, TEXTS[:3])
    assert choice.reasons["fastokens"] == "the package fastokens is not installed"
    assert choice.reasons["gigatoken"] == "it fails (index out of bounds)"
    assert choice.name in ("tiktoken", "tokenizers")
    with pytest.raises(
        EngineUnavailableError,
        match="fastokens cannot be used .* not installed: leave --engine out",
    ):
        open_engine("fastokens", tokenizer)
    with pytest.raises(
        DataError, match="gigatoken fails on one of document 0 to document 1 .*--engine tokenizers"
    ):
        CheckedEncoder(tokenizer, "gigatoken").encode_flat(["a", "b"], [0, 0], names("ab"))


def test_an_interrupt_is_not_taken_for_a_failing_engine(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(tokenizer: Tokenizer) -> engines.Engine:
        raise KeyboardInterrupt

    monkeypatch.setitem(engines._ENGINES, "fastokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        choose_engine(tokenizer, TEXTS[:1])


def test_an_unknown_engine_is_refused_with_the_nearest_name(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"no engine 'fastoken': did you mean fastokens\?"):
        open_engine("fastoken", tokenizer)


def test_a_running_engine_is_checked_on_the_documents_that_their_digests_choose(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Drifting:
        def __init__(self, tokenizer: Tokenizer) -> None:
            self._exact = engines._Tokenizers(tokenizer)

        def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            ids, offsets = self._exact.encode_flat(texts)
            ids[offsets[4] + 2] += 1
            return ids, offsets

    monkeypatch.setitem(engines._ENGINES, "fastokens", Drifting)
    texts = TEXTS[:6]
    encoder = CheckedEncoder(tokenizer, "fastokens", check_every=10)
    encoder.encode_flat(texts, [10, 1, 20, 3, 4, 5], names(texts))
    assert encoder.checked == 2
    with pytest.raises(
        DataError, match=r"fastokens gives another token 2 of document 4 .*--engine tokenizers"
    ):
        encoder.encode_flat(texts, [10, 1, 2, 3, 40, 5], names(texts))


def test_documents_where_engines_are_likely_to_differ_are_checked_more_often(
    tokenizer: Tokenizer,
) -> None:
    texts = ["plain", "größe", "it'ſ", "Adapazarı'nı", "x'\u212a", "ﬁ 's"]
    encoder = CheckedEncoder(tokenizer, "fastokens", check_every=1000)
    encoder.encode_flat(texts, [16] * len(texts), names(texts))
    assert encoder.checked == 3
    encoder.encode_flat(texts, [17] * len(texts), names(texts))
    assert encoder.checked == 3


def test_a_checked_engine_gives_what_the_engine_gives(tokenizer: Tokenizer) -> None:
    texts = [*TEXTS, *AWKWARD]
    expected = open_engine("tokenizers", tokenizer).encode_flat(texts)
    for name in JSON_ENGINES:
        encoder = CheckedEncoder(tokenizer, name, check_every=1)
        found = encoder.encode_flat(texts, range(len(texts)), names(texts))
        assert all(np.array_equal(one, other) for one, other in zip(expected, found, strict=True))
        assert encoder.checked == (0 if name == "tokenizers" else len(texts))


def test_letters_of_newer_unicode_are_tried_where_a_token_reaches_out_of_them() -> None:
    # U+A7CF came with Unicode 17; its last byte and '",' make up a token of signs here.
    tokenizer = train_bpe([f'"{sign}",' for sign in "⁏⎏␏▏●☏⚏"] * 9, TrainBPE(vocab_size=262))
    assert any(token.endswith('",') and len(token) == 3 for token in tokenizer.reference.vocabulary)
    assert (
        '\ua7cf", x' in "\n".join(newer_unicode_texts(tokenizer.reference.vocabulary)).splitlines()
    )
    assert not newer_unicode_texts(
        train_bpe(["plain"] * 9, TrainBPE(vocab_size=300)).reference.vocabulary
    )


def test_first_difference_is_a_token_or_the_end_of_the_shorter() -> None:
    ids = np.array([5, 6, 7])
    assert [
        first_difference(ids, np.array(other))
        for other in ([5, 6, 7], [5, 9, 7], [5, 6], [5, 6, 7, 8], [])
    ] == [None, 1, 2, 3, 0]


@pytest.mark.full
def test_the_whole_of_the_torture_takes_only_engines_that_agree(tokenizer: Tokenizer) -> None:
    choice = choose_engine(tokenizer, TEXTS)
    texts = [*torture_texts([SPECIAL]), *newer_unicode_texts(tokenizer.reference.vocabulary)]
    found = open_engine(choice.name, tokenizer).encode_flat(texts)
    assert all(
        np.array_equal(one, other)
        for one, other in zip(
            open_engine("tokenizers", tokenizer).encode_flat(texts), found, strict=True
        )
    )
