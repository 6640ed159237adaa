"""SentencePiece, tiktoken and Mistral tokenizers: ids are those of their own libraries, whether
they become tokenizer.json files or stay models, or they are refused.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from sentencepiece import sentencepiece_model_pb2

from data_pipeline.tokenizer import sentencepiece_model, tiktoken_ranks
from data_pipeline.tokenizer.agreement import disagreement, torture_texts
from data_pipeline.tokenizer.config import (
    MistralFile,
    SentencePieceFile,
    TiktokenFile,
    TrainBPE,
    TrainSentencePiece,
)
from data_pipeline.tokenizer.configured import load_configured
from data_pipeline.tokenizer.patterns import TEKKEN_PATTERN, TIKTOKEN_PATTERNS, byte_characters
from data_pipeline.tokenizer.sentencepiece_training import train_sentencepiece
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tokenizer.training import train_bpe
from pretrain.core.errors import ConfigError, DataError

LINES = [
    f"def f{number}(x): return x + {number}  # größer als 中文 and <the> others, isn't it"
    for number in range(200)
]
LINES += ["the quick brown fox jumps over the lazy dog <0x12/3456789ABCDEF>"] * 9
EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def short_torture(tokens: Iterable[str] = ()) -> list[str]:
    """Without the walk through all of Unicode."""
    return torture_texts(tokens)[-500:]


def fuzz_texts() -> list[str]:
    source = random.Random(1)
    return [
        *LINES[:20],
        *(
            "".join(source.choices(alphabet, k=60))
            for alphabet in ("ab", "e tr", "f1(x): ", "größe ", "  \n")
            for _ in range(60)
        ),
    ]


def sentencepiece_file(path: Path, **options: Any) -> SentencePieceFile:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=420,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    path.write_bytes(model.getvalue())
    return SentencePieceFile(kind="sentencepiece", path=str(path))


@pytest.mark.parametrize(
    "options",
    [
        EXACT | {"model_type": "bpe", "byte_fallback": True},
        EXACT
        | {
            "model_type": "bpe",
            "add_dummy_prefix": False,
            "byte_fallback": True,
            "user_defined_symbols": ["<user>"],
        },
        EXACT
        | {"model_type": "bpe", "remove_extra_whitespaces": True, "control_symbols": ["<turn>"]},
        EXACT | {"model_type": "unigram", "byte_fallback": True},
        EXACT | {"model_type": "unigram", "remove_extra_whitespaces": True},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_a_sentencepiece_model_gives_its_own_ids(tmp_path: Path, options: dict[str, Any]) -> None:
    config = sentencepiece_file(tmp_path / "m.model", **options)
    original = sentencepiece.SentencePieceProcessor(model_file=config.path)
    tokenizer = load_configured(config)
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.bos_id) == (
        original.vocab_size(),
        original.eos_id(),
        original.bos_id(),
    )
    texts = fuzz_texts()
    ids = [row.tolist() for row in tokenizer.encode(texts)]
    assert ids == original.encode(texts)
    assert original.decode(ids) == [tokenizer.decode(row) for row in ids] or not options.get(
        "byte_fallback"
    )
    for special in ("<s>", "</s>", "<unk>"):
        assert tokenizer.token_id(special) not in tokenizer.encode([f"a{special}b"])[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "bpe"}, "normalises Unicode by the rule 'nmt_nfkc'"),
        ({"model_type": "unigram", "byte_fallback": True}, "only of a BPE model"),
        ({"model_type": "bpe", "normalization_rule_name": "nfkc"}, "by the rule 'nfkc'"),
        (EXACT | {"model_type": "char"}, "only of a BPE model"),
        (EXACT | {"model_type": "bpe", "treat_whitespace_as_suffix": True}, "beginning of words"),
        (
            EXACT | {"model_type": "bpe", "user_defined_symbols": ["<user>", "\n"]},
            "user-defined symbols",
        ),
    ],
)
def test_a_sentencepiece_model_without_an_equal_file_stays_itself(
    tmp_path: Path, options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = sentencepiece_file(tmp_path / "m.model", **options)
    caplog.set_level("INFO")
    tokenizer = load_configured(config)
    assert reason in caplog.text
    assert tokenizer.content == Path(config.path).read_bytes()
    check_equal(tokenizer, Path(config.path))


def check_equal(tokenizer: Tokenizer, model: Path) -> None:
    """Ids, ends and texts are those of the sentencepiece library."""
    original = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.bos_id, tokenizer.pad_id) == (
        original.vocab_size(),
        original.eos_id(),
        original.bos_id(),
        None,
    )
    assert not tokenizer.reference.special_tokens.keys() - {"<s>", "</s>", "<turn>"}
    texts = [*fuzz_texts(), *torture_texts(["<s>", "</s>", "<unk>", "<user>", "<0x41>"])]
    ids = [row.tolist() for row in tokenizer.encode(texts)]
    assert ids == original.encode(texts)
    assert [tokenizer.decode(row) for row in ids] == original.decode(ids)
    assert tokenizer.decode([*ids[0], 2, 10**6]) == original.decode(ids[0]) + "</s>"


def test_pieces_that_are_switched_off_stay_unused(tmp_path: Path) -> None:
    config = sentencepiece_file(tmp_path / "m.model", **EXACT, model_type="bpe", byte_fallback=True)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(Path(config.path).read_bytes())
    unused = next(piece for piece in proto.pieces if piece.piece == "\u2581the")
    unused.type = 5
    Path(config.path).write_bytes(proto.SerializeToString())
    tokenizer = load_configured(config)
    assert tokenizer.token_id("\u2581the") not in tokenizer.encode(["the the"])[0]
    check_equal(tokenizer, Path(config.path))


def test_a_sentencepiece_model_that_came_out_otherwise_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = sentencepiece_file(tmp_path / "m.model", **EXACT, model_type="bpe", byte_fallback=True)
    assert load_configured(config).content.startswith(b"{")
    convert = sentencepiece_model._convert

    def without_prefix(proto: Any) -> Any:
        proto.normalizer_spec.add_dummy_prefix = False
        return convert(proto)

    monkeypatch.setattr(sentencepiece_model, "_convert", without_prefix)
    monkeypatch.setattr(sentencepiece_model, "torture_texts", short_torture)
    caplog.set_level("INFO")
    assert load_configured(config).content == Path(config.path).read_bytes()
    assert "no tokenizer.json equals it, as token 0 of" in caplog.text


def test_control_symbols_are_parsed_on_request(tmp_path: Path) -> None:
    options = {"model_type": "unigram", "control_symbols": ["<turn>", "<turn>x"]}
    config = sentencepiece_file(tmp_path / "m.model", **options)
    original = sentencepiece.SentencePieceProcessor(model_file=config.path)
    text = "<s>the fox<turn>xyz <turn>jumps</s></s>"
    plain = load_configured(config)
    assert plain.encode([text])[0].tolist() == original.encode(text)
    parsing = load_configured(config.model_copy(update={"parse_special_tokens": True}))
    assert parsing.encode([text, "a", ""])[0].tolist() == [
        1,
        *original.encode("the fox"),
        original.piece_to_id("<turn>x"),
        *original.encode("yz "),
        original.piece_to_id("<turn>"),
        *original.encode("jumps"),
        2,
        2,
    ]


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_trained_sentencepiece_model_is_the_same_each_time(model_type: Any) -> None:
    config = TrainSentencePiece(
        kind="train_sentencepiece",
        model_type=model_type,
        vocab_size=500,
        byte_fallback=True,
        eod_token="<|end|>",
        pad_token="<pad>",
        reserved_tokens=["<|fim|>"],
        user_defined_symbols=["<user>", ","],
    )
    texts = [*LINES, "x" * 9999 + "\0\n\n"]
    tokenizer = train_sentencepiece(iter(texts), config)
    assert train_sentencepiece(iter(texts), config).content == tokenizer.content
    names = ["<unk>", "<s>", "<|end|>", "<pad>", "<|fim|>", "<user>", ",", "<0x00>"]
    assert [tokenizer.token_id(name) for name in names] == list(range(8))
    assert (tokenizer.eod_id, tokenizer.bos_id, tokenizer.pad_id) == (2, 1, 3)
    assert 300 < tokenizer.vocab_size <= 500
    ids = tokenizer.encode(["größer, <user>中文<|fim|>\u00bd"])[0].tolist()
    assert {5, 6} < set(ids) and not {0, 4} & set(ids)
    assert tokenizer.decode(ids) == "größer, <user>中文<|fim|>1⁄2"


def test_a_sentencepiece_model_that_cannot_be_trained_is_one_sentence() -> None:
    config = TrainSentencePiece(kind="train_sentencepiece", vocab_size=10)
    with pytest.raises(ConfigError, match=r"smaller than required_chars.*change its vocab_size"):
        train_sentencepiece(iter(LINES), config)
    with pytest.raises(DataError, match="holds no text"):
        train_sentencepiece(iter(["", "\n"]), config)
    for wrong, reason in (
        ({"reserved_tokens": ["<s>"]}, "'<s>' is named twice"),
        ({"vocab_size": 259, "byte_fallback": True}, "larger than 259"),
        ({"user_defined_symbols": [""]}, "empty name"),
    ):
        with pytest.raises(ValueError, match=reason):
            TrainSentencePiece(kind="train_sentencepiece", **wrong)


def trained_ranks(**options: Any) -> tuple[Tokenizer, dict[bytes, int]]:
    tokenizer = train_bpe(LINES, TrainBPE(vocab_size=420, **options))
    spelling = {character: bytes([value]) for value, character in enumerate(byte_characters())}
    merges = ["".join(pair) for pair in json.loads(tokenizer.content)["model"]["merges"]]
    return tokenizer, {
        b"".join(spelling[c] for c in token): rank
        for rank, token in enumerate([*byte_characters(), *merges])
    }


def tiktoken_file(path: Path, ranks: dict[bytes, int], **options: Any) -> TiktokenFile:
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    )
    return TiktokenFile(
        kind="tiktoken",
        path=str(path),
        **({"special_tokens": {"<|endoftext|>": len(ranks) + 7}} | options),
    )


@pytest.mark.parametrize(
    "pattern",
    [
        "cl100k_base",
        r"\w+|\W",
        *(
            pytest.param(pattern, marks=pytest.mark.full)
            for pattern in ("gpt2", "o200k_base", TEKKEN_PATTERN)
        ),
    ],
)
def test_a_tiktoken_vocabulary_gives_its_own_ids(tmp_path: Path, pattern: str) -> None:
    _, ranks = trained_ranks(whitespace="runs", digits="triples")
    tokenizer = load_configured(tiktoken_file(tmp_path / "t.tiktoken", ranks, pattern=pattern))
    original = tiktoken.Encoding(
        "t",
        pat_str=TIKTOKEN_PATTERNS.get(pattern, pattern),
        mergeable_ranks=ranks,
        special_tokens={},
    )
    texts = [*fuzz_texts(), "a<|endoftext|>b"]
    assert [row.tolist() for row in tokenizer.encode(texts)] == [
        original.encode_ordinary(text) for text in texts
    ]
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (len(ranks) + 7, len(ranks) + 8)
    assert (
        tokenizer.decode([*original.encode_ordinary("größer"), tokenizer.eod_id])
        == "größer<|endoftext|>"
    )


@pytest.mark.parametrize("name", sorted(TIKTOKEN_PATTERNS))
def test_the_pattern_of_a_tiktoken_encoding_cuts_words_as_tiktoken_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiktoken_ext import openai_public

    _, ranks = trained_ranks(whitespace="runs")
    # The encodings' own vocabularies are downloads; their patterns are not.
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
    theirs = tiktoken.Encoding(
        "t",
        pat_str=getattr(openai_public, name)()["pat_str"],
        mergeable_ranks=ranks,
        special_tokens={},
    )
    ours = tiktoken.Encoding(
        "o", pat_str=TIKTOKEN_PATTERNS[name], mergeable_ranks=ranks, special_tokens={}
    )
    texts = short_torture()
    assert theirs.encode_ordinary_batch(texts, num_threads=1) == ours.encode_ordinary_batch(
        texts, num_threads=1
    )
    assert ours.encode_ordinary("12345 they'll") != theirs.encode_ordinary("123 45 they'll")


def test_a_pattern_that_the_libraries_read_differently_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiktoken_ranks, "torture_texts", short_torture)
    _, ranks = trained_ranks()
    possessive = r"\p{N}{1,2}+|\P{N}"
    with pytest.raises(DataError, match="has no equal tokenizer.json, as token"):
        load_configured(tiktoken_file(tmp_path / "t.tiktoken", ranks, pattern=possessive))


def test_ranks_that_came_out_otherwise_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ranks = trained_ranks()
    build = tiktoken_ranks._model

    def reversed_merges(ranks: dict[bytes, int], *rest: Any) -> Any:
        model = json.loads(build(ranks, *rest).__getstate__())
        return tiktoken_ranks.models.BPE(
            vocab=model["vocab"], merges=[tuple(pair) for pair in reversed(model["merges"])]
        )

    monkeypatch.setattr(tiktoken_ranks, "_model", reversed_merges)
    monkeypatch.setattr(tiktoken_ranks, "torture_texts", short_torture)
    with pytest.raises(DataError, match="has no equal tokenizer.json, as token"):
        load_configured(tiktoken_file(tmp_path / "t.tiktoken", ranks, pattern="gpt2"))


def test_damaged_or_clashing_vocabularies_are_refused(tmp_path: Path) -> None:
    _, ranks = trained_ranks()
    whole = tiktoken_file(tmp_path / "t.tiktoken", ranks, pattern="gpt2")
    cases: dict[str, tuple[dict[bytes, int], dict[str, Any]]] = {
        "no token for the byte 65": (
            {token: rank for token, rank in ranks.items() if token != b"A"},
            {},
        ),
        "gives an id to two tokens": (ranks, {"special_tokens": {"<|endoftext|>": 5}}),
        "gives an id to two tokens, or one outside": (
            ranks,
            {"special_tokens": {"<|endoftext|>": -1}},
        ),
        "has 'th' as an ordinary token": (ranks | {b"th": 999}, {"special_tokens": {"th": 9999}}),
        "check its pattern": (ranks, {"pattern": "("}),
    }
    for reason, (changed, options) in cases.items():
        with pytest.raises(DataError, match=reason):
            load_configured(
                tiktoken_file(tmp_path / "c.tiktoken", changed, **({"pattern": "gpt2"} | options))
            )
    for content in (b"AA== x\n", b"A\xff 3\n", b"QQ==\n", b"QQ== 1 2\n"):
        (tmp_path / "d.tiktoken").write_bytes(Path(whole.path).read_bytes() + content)
        with pytest.raises(
            DataError, match=f"line {len(ranks) + 1}: .* is no base64 token and rank"
        ):
            load_configured(whole.model_copy(update={"path": str(tmp_path / "d.tiktoken")}))


def test_damaged_sentencepiece_models_are_refused_in_one_sentence(tmp_path: Path) -> None:
    config = sentencepiece_file(tmp_path / "m.model", **EXACT, model_type="bpe", byte_fallback=True)
    content = Path(config.path).read_bytes()
    without_unknown = sentencepiece_model_pb2.ModelProto()
    without_unknown.ParseFromString(content)
    without_unknown.pieces[0].type = 1
    for damaged in (
        b"",
        b"not a model",
        content[: len(content) // 2],
        b"\x00" * 99,
        without_unknown.SerializeToString(),
    ):
        Path(config.path).write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            load_configured(config)
        assert config.path in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    for config in (
        SentencePieceFile(kind="sentencepiece", path=absent),
        TiktokenFile(kind="tiktoken", path=absent, pattern="gpt2"),
    ):
        with pytest.raises(DataError, match="absent cannot be read"):
            load_configured(config)
    for name in ("tekken_24091.json", "../data/tekken_240911.json"):
        with pytest.raises(ConfigError, match=r"did you mean tekken_240911\.json"):
            load_configured(MistralFile(kind="mistral", name=name))


def mistral_texts() -> list[str]:
    return [*fuzz_texts(), *torture_texts()[::20], "<s>[INST] hi [/INST]</s>"]


def test_mistrals_sentencepiece_model_gives_the_ids_of_mistral_common() -> None:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = load_configured(
        MistralFile(
            kind="mistral", name="mistral_instruct_tokenizer_240323.model.v3", vocab_size=32768
        )
    )
    original = MistralTokenizer.v3().instruct_tokenizer.tokenizer
    expected = [original.encode(text, bos=False, eos=False) for text in mistral_texts()]
    assert [row.tolist() for row in tokenizer.encode(mistral_texts())] == expected
    assert (tokenizer.bos_id, tokenizer.eod_id) == (original.bos_id, original.eos_id)


@pytest.mark.full
@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_tekken_gives_the_ids_of_mistral_common(name: str) -> None:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    original = MistralTokenizer.from_file(
        str(files("mistral_common") / "data" / name)
    ).instruct_tokenizer.tokenizer
    tokenizer = load_configured(MistralFile(kind="mistral", name=name, vocab_size=131072))
    expected = [original.encode(text, bos=False, eos=False) for text in mistral_texts()]
    assert [row.tolist() for row in tokenizer.encode(mistral_texts())] == expected
    assert (tokenizer.bos_id, tokenizer.eod_id, tokenizer.pad_id) == (
        original.bos_id,
        original.eos_id,
        original.pad_id,
    )


def test_a_disagreement_names_the_text_and_the_token() -> None:
    assert disagreement(["a", "b"], [[1], [2, 3]], [[1], [2, 3]]) is None
    assert (
        disagreement(["a", "b"], [[1], [2, 3]], [[1], [2, 4]]) == "token 1 of 'b' is 4 instead of 3"
    )
    assert disagreement(["a"], [[1, 2]], [[1]]) == "token 1 of 'a' is missing instead of 2"
