"""Generated documents through every engine: ids are those of the tokenizer's own library."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from data_pipeline.tokenizer import engine_choice, engines
from data_pipeline.tokenizer.agreement import first_difference, folding_characters
from data_pipeline.tokenizer.boundary_probe import boundary_probe
from data_pipeline.tokenizer.config import TokenPolicy, TrainBPE, TrainSentencePiece
from data_pipeline.tokenizer.engine_choice import choose_engine
from data_pipeline.tokenizer.engines import EngineUnavailableError, open_engine
from data_pipeline.tokenizer.files import name_of, same_kind_of, tokenizer_file
from data_pipeline.tokenizer.patterns import TIKTOKEN_PATTERNS, byte_characters, pre_tokenizer
from data_pipeline.tokenizer.sentencepiece_model import convert_sentencepiece
from data_pipeline.tokenizer.sentencepiece_training import train_sentencepiece
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tokenizer.training import train_bpe
from tests.support.generated_documents import generated_documents
from tests.support.paths import ROOT

SPECIAL = [f"<special_{number}>" for number in range(37)]
# Bytes without a token in StarCoder2's vocabulary are of this kind.
MISSING = [0x0B, 0xC0, 0xC1, *range(0xF1, 0x100)]
FAST = ("fastokens", "gigatoken", "tiktoken")
QUICK, FULL = 400, 10_000


@cache
def corpus() -> list[str]:
    documents = list(generated_documents(300, [], seed=9))
    return [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))] + documents


@cache
def trained_content(**options: Any) -> bytes:
    return train_bpe(
        corpus(), TrainBPE(vocab_size=3000, reserved_tokens=SPECIAL, **options)
    ).content


def trained(policy: TokenPolicy | None = None, **options: Any) -> Tokenizer:
    return Tokenizer(trained_content(**options), "trained", policy)


def o200k_like(policy: TokenPolicy | None = None) -> Tokenizer:
    content = json.loads(trained(whitespace="runs").content)
    state = pre_tokenizer(TIKTOKEN_PATTERNS["o200k_base"]).__getstate__()
    content["pre_tokenizer"] = json.loads(state)
    return Tokenizer(json.dumps(content).encode(), "o200k-like", policy)


def starcoder2_like(policy: TokenPolicy | None = None, unknown: str | None = None) -> Tokenizer:
    """Digits alone, then GPT-2's words; 38 special tokens; bytes without a token."""
    content = json.loads(trained(digits="single").content)
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True},
        ],
    }  # fmt: skip
    missing = {byte_characters()[value] for value in MISSING}
    model = content["model"]
    merges = [pair for pair in model["merges"] if not missing & set("".join(pair))]
    kept = [token for token in model["vocab"] if token in SPECIAL or not missing & set(token)]
    model |= {
        "vocab": {token: number for number, token in enumerate(kept)},
        "merges": merges,
        "unk_token": unknown,
    }
    for token in content["added_tokens"]:
        token["id"] = model["vocab"][token["content"]]
    return Tokenizer(json.dumps(content).encode(), "starcoder2-like", policy)


FAMILIES: dict[str, Callable[..., Tokenizer]] = {
    "gpt2": trained,
    "gpt2 single digits": lambda policy=None: trained(policy, digits="single"),
    "cl100k": lambda policy=None: trained(policy, whitespace="runs", digits="triples"),
    "o200k": o200k_like,
    "starcoder2": starcoder2_like,
    "starcoder2 with unk": lambda policy=None: starcoder2_like(policy, "<|endoftext|>"),
}


@cache
def sentencepiece_like(model_type: Any, normalization: Any, byte_fallback: bool) -> Tokenizer:
    config = TrainSentencePiece(
        kind="train_sentencepiece",
        vocab_size=3000,
        model_type=model_type,
        normalization=normalization,
        byte_fallback=byte_fallback,
        character_coverage=0.98,
        reserved_tokens=SPECIAL,
    )
    return train_sentencepiece(corpus(), config)


def differences(
    name: str,
    tokenizer: Tokenizer,
    documents: list[str],
    expected: list[np.ndarray[Any, Any]] | None = None,
) -> list[str]:
    """The documents of which an engine gives other ids than the tokenizer's own library."""
    expected = tokenizer.encode(documents) if expected is None else expected
    ids, offsets = open_engine(name, tokenizer).encode_flat(documents)
    found = np.split(ids, offsets[1:-1])
    return [
        text
        for text, one, other in zip(documents, expected, found, strict=True)
        if first_difference(one, other) is not None
    ]


def refusal(name: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Why the choice of an engine would not take this one; None if only for its speed."""
    monkeypatch.setattr(engine_choice, "ENGINE_NAMES", (name, tokenizer.reference.engine))
    reason = choose_engine(tokenizer, corpus()[:3]).reasons.get(name, "it is slower")
    return None if reason.startswith("it is slower") else reason


def check_family(
    tokenizer: Tokenizer, count: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str | None]:
    documents = list(generated_documents(count, [*SPECIAL[:3], "<|endoftext|>"]))
    reasons = {name: refusal(name, tokenizer, monkeypatch) for name in FAST}
    expected = tokenizer.encode(documents)
    for name in FAST:
        if reasons[name] is None:
            assert differences(name, tokenizer, documents, expected) == [], name
    return reasons


lanes = pytest.mark.parametrize(
    "count", [QUICK, pytest.param(FULL, marks=[pytest.mark.full, pytest.mark.timeout(1800)])]
)


@lanes
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parse", [False, True], ids=["plain", "parsing"])
def test_every_engine_that_may_be_chosen_gives_equal_ids(
    family: str, parse: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = TokenPolicy(parse_special_tokens=parse, append_eod=False)
    reasons = check_family(FAMILIES[family](policy), count, monkeypatch)
    # An engine that no one may choose would make the test an empty one.
    assert reasons["fastokens"] is None, reasons


@lanes
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("normalization", ["nmt_nfkc", "identity"])
@pytest.mark.parametrize("byte_fallback", [False, True])
def test_sentencepiece_models_give_the_ids_of_their_library(
    model_type: str, normalization: str, byte_fallback: bool, count: int
) -> None:
    model = sentencepiece_like(model_type, normalization, byte_fallback)
    original = sentencepiece.SentencePieceProcessor(model_proto=model.content)
    documents = list(generated_documents(count, [*SPECIAL[:3], "</s>"]))
    expected = original.encode(documents)
    assert not differences("sentencepiece", model, documents)
    # As the recipe's kind sentencepiece loads it: perhaps an equal tokenizer.json.
    loaded = Tokenizer(convert_sentencepiece(model.content, "model"), "loaded")
    is_converted = loaded.reference.engine == "tokenizers"
    assert is_converted == (model_type == "bpe" and normalization == "identity")
    found = [row.tolist() for row in loaded.encode(documents)]
    assert [text for text, one, other in zip(documents, expected, found, strict=True)
            if one != other] == []  # fmt: skip
    for name in FAST:
        with pytest.raises(EngineUnavailableError, match="it is a SentencePiece model"):
            open_engine(name, model)


def test_texts_with_missing_bytes_are_encoded_as_the_tokenizers_library_does() -> None:
    texts = ["a\x0bb\x0b\x0b", "!\U00050000!", "\U0010ffff", "x \U000e0001y", "", "plain", "\x0b"]
    for unknown in (None, "<|endoftext|>"):
        tokenizer = starcoder2_like(unknown=unknown)
        assert len(tokenizer.reference.special_tokens) == 38
        assert differences("fastokens", tokenizer, texts) == []
        ids = open_engine("fastokens", tokenizer).encode_flat(texts)[0]
        assert ids.max() < tokenizer.vocab_size
        assert (tokenizer.eod_id in ids) == (unknown is not None)


def test_a_folded_contraction_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = o200k_like()
    probe = boundary_probe(tokenizer)
    assert probe is not None
    texts = [
        "".join(letters)
        for length in (2, 3, 4)
        for letters in itertools.product("'ſ\u212a\u0131\ufb01\u00dfsSx", repeat=length)
    ]
    assert differences("fastokens", probe, texts) == []
    assert refusal("fastokens", tokenizer, monkeypatch) is None
    assert refusal("fastokens", FAMILIES["cl100k"](), monkeypatch) is None
    assert {"ſ", "\u212a"} < set(folding_characters())
    # Without the detour the engine cuts at other places, and is not chosen.
    monkeypatch.setattr(engines, "_FOLDED_CONTRACTION", engines.re.compile("(?!)"))
    assert "x'ſ" in differences("fastokens", probe, texts)
    for family in ("cl100k", "o200k"):
        its_probe = boundary_probe(FAMILIES[family]())
        assert its_probe is not None
        where = engine_choice._other_cut("fastokens", its_probe)
        assert where is not None and where.startswith("text ")
        assert refusal("fastokens", FAMILIES[family](), monkeypatch) is not None


def test_dropout_is_off_while_texts_are_encoded(caplog: pytest.LogCaptureFixture) -> None:
    content = json.loads(trained().content)
    content["model"]["dropout"] = 0.5
    content = json.dumps(content).encode()
    tokenizer = Tokenizer(content, "dropping")
    again = Tokenizer(content, "dropping")
    assert caplog.text.count("dropping has a dropout of 0.5, which is off") == 1
    assert tokenizer.content == content
    texts = corpus()[:3]
    expected = [row.tolist() for row in trained().encode(texts)]
    for each in (tokenizer, again):
        assert [row.tolist() for row in each.encode(texts)] == expected
        for name in FAST:
            assert differences(name, each, texts) == []


def test_the_file_of_a_tokenizer_is_found_by_its_content(tmp_path: Path) -> None:
    model = sentencepiece_like("bpe", "nmt_nfkc", False).content
    assert (name_of(model), name_of(trained().content)) == ("tokenizer.model", "tokenizer.json")
    assert name_of(b'\n{"version": "1.0"}') == "tokenizer.json"
    assert same_kind_of(tmp_path / "corpus.tokenizer.model") == "tokenizer.model"
    assert tokenizer_file(tmp_path).name == "tokenizer.json"
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert tokenizer_file(tmp_path).name == "tokenizer.model"
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    assert tokenizer_file(tmp_path).name == "tokenizer.json"
