"""Byte-level BPE: round trips, determinism, exact cutting of long texts, foreign files, tokens
around documents.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import models, pre_tokenizers

from data_pipeline.tokenizer import patterns
from data_pipeline.tokenizer.agreement import torture_texts
from data_pipeline.tokenizer.config import TokenizerFile, TokenPolicy, TrainBPE
from data_pipeline.tokenizer.configured import load_configured
from data_pipeline.tokenizer.patterns import cut_before_white_space
from data_pipeline.tokenizer.tokenizer import Tokenizer, load_tokenizer
from data_pipeline.tokenizer.training import train_bpe
from pretrain.core.errors import ConfigError, DataError

EOD_TOKEN = "<|endoftext|>"
CONFIG = TrainBPE(vocab_size=320)
TEXTS = [f"def f{number}(x):\n    return x + {number}  # größer\n" * 3 for number in range(50)]
TRAIN = """
import sys
from data_pipeline.tokenizer.training import train_bpe
from data_pipeline.tokenizer.config import TrainBPE
texts = [f"def f{number}(x):\\n    return x + {number}  # größer\\n" * 3 for number in range(50)]
sys.stdout.buffer.write(train_bpe(texts, TrainBPE(vocab_size=320)).content)
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, CONFIG)


OPTIONS = [
    (digits, whitespace)
    for digits in ("as_words", "single", "triples")
    for whitespace in ("gpt2", "runs")
]


@pytest.fixture(scope="module")
def by_options() -> dict[tuple[str, str], Tokenizer]:
    texts = [*TEXTS, "int main() {\n\n    return 12345 + 678;\n}\n" * 20]
    return {
        (digits, whitespace): train_bpe(
            texts, TrainBPE(vocab_size=400, digits=digits, whitespace=whitespace)
        )
        for digits, whitespace in OPTIONS
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  x",
        "\x00\x01\x7f",
        "tab\tCRLF\r\nlone\r",
        "ünï 中文 🤖\U0010ffff",
        "a" * 500,
        f"a{EOD_TOKEN}b",
        "\ufeffbom",
        " \u2028\x85 ",
    ],
)
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    [ids] = tokenizer.encode([text])
    assert tokenizer.decode(ids.tolist()) == text


@settings(max_examples=150, deadline=None)
@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]))
    | st.text(alphabet="ab1 \n\t\r.'s\x00\x1c\x85\u2028<|>é中")
)
def test_any_text_round_trips_with_any_options(
    by_options: dict[tuple[str, str], Tokenizer], text: str
) -> None:
    for tokenizer in by_options.values():
        assert tokenizer.decode(tokenizer.encode([text])[0].tolist()) == text


def test_every_plane_round_trips_with_any_options(
    by_options: dict[tuple[str, str], Tokenizer],
) -> None:
    texts = torture_texts([EOD_TOKEN])[::7]
    for tokenizer in by_options.values():
        assert [tokenizer.decode(ids.tolist()) for ids in tokenizer.encode(texts)] == texts


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    return [
        text[start:end]
        for _, (start, end) in tokenizer.reference.backend.pre_tokenizer.pre_tokenize_str(text)
    ]


def test_options_decide_how_digits_and_line_ends_are_cut(
    by_options: dict[tuple[str, str], Tokenizer],
) -> None:
    text = "x 1234\n\n    y"
    assert words(by_options["as_words", "gpt2"], text) == ["x", " 1234", "\n\n   ", " y"]
    assert words(by_options["single", "gpt2"], text) == [
        "x",
        " ",
        "1",
        "2",
        "3",
        "4",
        "\n\n   ",
        " y",
    ]
    assert words(by_options["triples", "gpt2"], text) == ["x", " ", "123", "4", "\n\n   ", " y"]
    assert words(by_options["as_words", "runs"], text) == ["x", " 1234", "\n\n", "   ", " y"]
    assert words(by_options["single", "runs"], text) == [
        "x",
        " ",
        "1",
        "2",
        "3",
        "4",
        "\n\n",
        "   ",
        " y",
    ]
    assert words(by_options["triples", "runs"], text) == ["x", " ", "123", "4", "\n\n", "   ", " y"]
    assert len({tokenizer.sha256 for tokenizer in by_options.values()}) == len(OPTIONS)


def test_no_token_of_a_trained_tokenizer_holds_more_digits_than_its_option_allows(
    by_options: dict[tuple[str, str], Tokenizer],
) -> None:
    def longest(digits: str, whitespace: str) -> int:
        vocabulary = json.loads(by_options[digits, whitespace].content)["model"]["vocab"]
        return max(sum(character.isdigit() for character in token) for token in vocabulary)

    assert [longest("single", "runs"), longest("triples", "runs"), longest("as_words", "runs")] == [
        1,
        3,
        5,
    ]


def test_special_tokens_come_first_in_their_order() -> None:
    config = TrainBPE(
        vocab_size=300,
        eod_token="<eod>",
        reserved_tokens=["<fim>", "<mid>"],
        bos_token="<s>",
        pad_token="<pad>",
        prepend_bos=True,
    )
    tokenizer = train_bpe(TEXTS, config)
    assert [
        tokenizer.token_id(token)
        for token in ("<eod>", "<fim>", "<mid>", "<s>", "<pad>", "<absent>")
    ] == [0, 1, 2, 3, 4, None]
    assert (
        tokenizer.eod_id,
        tokenizer.bos_id,
        tokenizer.pad_id,
        tokenizer.append_eod,
        tokenizer.prepend_bos,
    ) == (0, 3, 4, True, True)
    assert min(tokenizer.encode(["<eod><fim><mid><s><pad>"])[0].tolist()) > 4


def test_pairs_rarer_than_min_frequency_are_not_joined() -> None:
    texts = ["qz " * 3, "ab " * 9]
    tokens = json.loads(train_bpe(texts, TrainBPE(vocab_size=400, min_frequency=5)).content)[
        "model"
    ]["vocab"]
    assert "ab" in tokens and "qz" not in tokens
    assert "qz" in json.loads(train_bpe(texts, TrainBPE(vocab_size=400)).content)["model"]["vocab"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"reserved_tokens": ["<a>", "<a>"]}, "names a token twice"),
        ({"reserved_tokens": ["a"]}, "'a' is too short"),
        ({"vocab_size": 258, "reserved_tokens": ["<a>", "<b>"]}, "larger than 259"),
        ({"prepend_bos": True}, "give bos_token"),
    ],
)
def test_training_options_that_cannot_work_are_refused(
    options: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        TrainBPE.model_validate(options)


def test_a_spelled_out_special_token_does_not_end_the_document(tokenizer: Tokenizer) -> None:
    [ids] = tokenizer.encode([f"before{EOD_TOKEN}after"])
    assert tokenizer.eod_id == 0
    assert tokenizer.eod_id not in ids.tolist()


def test_vocabulary_has_the_size_asked_for_and_all_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 320
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(
        json.loads(tokenizer.content)["model"]["vocab"]
    )


def test_training_gives_the_same_file_whatever_the_threads_and_hash_seed(
    tokenizer: Tokenizer,
) -> None:
    for threads in ("1", "3"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        result = subprocess.run(
            [sys.executable, "-c", TRAIN], env=environment, stdout=subprocess.PIPE, check=True
        )
        assert hashlib.sha256(result.stdout).hexdigest() == tokenizer.sha256


def test_other_texts_give_another_file(tokenizer: Tokenizer) -> None:
    assert train_bpe([*TEXTS, "something else, something else"], CONFIG).sha256 != tokenizer.sha256


def adversarial_texts() -> list[str]:
    source = random.Random(0)
    return [
        "".join(source.choices("ab 1\n\t\r.,'s\x1c\x85\u00a0\u2003é中<|>\x00", k=2000))
        for _ in range(12)
    ] + ["".join(TEXTS)]


def ids_of(tokenizer: Tokenizer, parts: list[str]) -> list[int]:
    """Ids by the library alone, which cuts nothing."""
    return [
        token
        for part in parts
        for token in tokenizer.reference.backend.encode(part, add_special_tokens=False).ids
    ]


def test_pieces_of_a_long_text_encode_to_the_tokens_of_the_whole(
    by_options: dict[tuple[str, str], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "PIECE_CHARACTERS", 40)
    for tokenizer in by_options.values():
        for text in adversarial_texts():
            pieces = list(tokenizer.pieces(text))
            assert len(pieces) > 10 and "".join(pieces) == text
            assert (
                ids_of(tokenizer, pieces)
                == ids_of(tokenizer, [text])
                == tokenizer.encode([text])[0].tolist()
            )


def test_pieces_cut_anywhere_would_change_tokens(
    by_options: dict[tuple[str, str], Tokenizer],
) -> None:
    for tokenizer in by_options.values():
        text = "".join(TEXTS)
        assert ids_of(
            tokenizer, [text[start : start + 40] for start in range(0, len(text), 40)]
        ) != ids_of(tokenizer, [text])


def test_training_in_pieces_gives_the_same_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for digits, whitespace in OPTIONS:
        config = TrainBPE(vocab_size=320, digits=digits, whitespace=whitespace)
        monkeypatch.setattr(patterns, "PIECE_CHARACTERS", 1 << 17)
        whole = train_bpe(["".join(TEXTS)], config)
        monkeypatch.setattr(patterns, "PIECE_CHARACTERS", 40)
        assert train_bpe(cut_before_white_space("".join(TEXTS)), config).sha256 == whole.sha256


def test_a_text_is_not_cut_where_an_added_token_could_reach_across(tokenizer: Tokenizer) -> None:
    changed = json.loads(tokenizer.content)
    changed["added_tokens"].append(
        {
            "id": 321,
            "content": "a b",
            "special": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    )
    text = "a b " * 100_000
    assert len(list(tokenizer.pieces(text))) > 1
    assert list(Tokenizer(json.dumps(changed).encode(), "changed").pieces(text)) == [text]


@pytest.mark.parametrize("eod", ["</s>", "<eos>", "<|end_of_text|>"])
def test_end_of_document_of_a_foreign_tokenizer_is_found_and_its_long_texts_are_not_cut(
    tmp_path: Path, eod: str
) -> None:
    foreign = tokenizers.Tokenizer(
        models.WordLevel({"a": 0, "unknown": 1, eod: 7}, unk_token="unknown")
    )
    foreign.pre_tokenizer = pre_tokenizers.Metaspace()
    foreign.enable_truncation(2)
    foreign.enable_padding(length=9)
    foreign.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.eod_id, loaded.vocab_size) == (7, 8)
    text = "a " * 200_000
    assert list(loaded.pieces(text)) == [text]
    assert len(loaded.encode(["a b c d"])[0]) == 4


def test_unusable_tokenizer_files_are_refused_by_name(tmp_path: Path) -> None:
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(
        str(tmp_path / "no_eod.json")
    )
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    (tmp_path / "large.json").write_bytes(
        foreign("</s>").replace(b'"</s>":2', b'"</s>":2147483648')
    )
    tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "empty.json"))
    reasons = {
        "no_eod": "no end-of-document token",
        "broken": "not a tokenizer",
        "binary": "not a tokenizer",
        "large": "ids of 2.31 and more",
        "empty": "no tokens",
    }
    for name, reason in reasons.items():
        with pytest.raises(DataError, match=f"{name}.json.*{reason}"):
            load_tokenizer(tmp_path / f"{name}.json")
    with pytest.raises(DataError, match=r"absent\.json cannot be read"):
        load_tokenizer(tmp_path / "absent.json")


def foreign(*tokens: str) -> bytes:
    vocabulary = {token: number for number, token in enumerate(["a", "unknown", *tokens])}
    return tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="unknown")).to_str().encode()


def test_tokens_that_the_recipe_names_are_taken_before_well_known_ones() -> None:
    content = foreign("</s>", "<s>", "<pad>", "<|turn|>", "<|start|>")
    known = Tokenizer(content, "t")
    assert (known.eod_id, known.bos_id, known.pad_id) == (2, 3, 4)
    named = Tokenizer(
        content,
        "t",
        TokenPolicy(
            eod_token="<|turn|>", bos_token="<|start|>", pad_token="</s>", prepend_bos=True
        ),
    )
    assert (named.eod_id, named.bos_id, named.pad_id, named.prepend_bos) == (5, 6, 2, True)


def test_a_named_token_that_is_not_there_is_refused_with_near_ones() -> None:
    for field in ("eod_token", "bos_token", "pad_token"):
        with pytest.raises(
            DataError,
            match=f"t has no token '<|trun|>', but <|turn|>, </s>: correct {field}".replace(
                "|", r"\|"
            ),
        ):
            Tokenizer(
                foreign("</s>", "<|turn|>"), "t", TokenPolicy.model_validate({field: "<|trun|>"})
            )


def test_a_tokenizer_needs_only_the_tokens_that_are_written() -> None:
    with pytest.raises(
        DataError, match="no end-of-document token for append_eod: .* or set append_eod to false"
    ):
        Tokenizer(foreign("<s>"), "t")
    without_eod = Tokenizer(
        foreign("<pad>", "<s>"), "t", TokenPolicy(append_eod=False, prepend_bos=True)
    )
    assert (without_eod.eod_id, without_eod.bos_id) == (3, 3)
    assert Tokenizer(foreign("<pad>"), "t", TokenPolicy(append_eod=False)).eod_id == 2
    without_any = Tokenizer(foreign(), "t", TokenPolicy(append_eod=False))
    assert (without_any.eod_id, without_any.bos_id, without_any.pad_id) == (None, None, None)
    with pytest.raises(DataError, match="name the one that begins a document with bos_token"):
        Tokenizer(foreign("</s>"), "t", TokenPolicy(prepend_bos=True))


def test_a_configured_file_has_the_vocabulary_size_that_was_said(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(foreign("</s>"))
    assert load_configured(TokenizerFile(kind="file", path=str(path), vocab_size=3)).vocab_size == 3
    with pytest.raises(ConfigError, match="vocab_size is 4, but .* has 3 entries"):
        load_configured(TokenizerFile(kind="file", path=str(path), vocab_size=4))


def test_importing_the_package_loads_no_optional_library() -> None:
    heavy = (
        "{'transformers', 'tiktoken', 'sentencepiece', 'mistral_common', 'fastokens', 'gigatoken',"
        " 'torch'}"
    )
    code = (
        "import sys, data_pipeline.tokenizer, data_pipeline.tokenizer.engine_choice; assert not"
        f" {heavy} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
