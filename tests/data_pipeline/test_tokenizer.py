"""Byte-level BPE: round trips, determinism, exact cutting of long texts, foreign files."""

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
from tokenizers import models, pre_tokenizers

from data_pipeline import tokenizer as module
from data_pipeline.tokenizer import EOD_TOKEN, Tokenizer, cut_before_white_space, load_tokenizer, train_bpe
from pretrain.config.errors import DataError

TEXTS = [f"def f{number}(x):\n    return x + {number}  # größer\n" * 3 for number in range(50)]
TRAIN = """
import sys
from data_pipeline.tokenizer import train_bpe
texts = [f"def f{number}(x):\\n    return x + {number}  # größer\\n" * 3 for number in range(50)]
sys.stdout.buffer.write(train_bpe(texts, 320).content)
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 320)


@pytest.mark.parametrize(
    "text", ["", " ", "  x", "\x00\x01\x7f", "tab\tCRLF\r\nlone\r", "ünï 中文 🤖\U0010ffff", "a" * 500, f"a{EOD_TOKEN}b", "\ufeffbom", " \u2028\x85 "]
)
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    [ids] = tokenizer.encode([text])
    assert tokenizer.decode(ids.tolist()) == text


def test_a_spelled_out_special_token_does_not_end_the_document(tokenizer: Tokenizer) -> None:
    [ids] = tokenizer.encode([f"before{EOD_TOKEN}after"])
    assert tokenizer.eod_id == 0
    assert tokenizer.eod_id not in ids.tolist()


def test_vocabulary_has_the_size_asked_for_and_all_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 320
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(json.loads(tokenizer.content)["model"]["vocab"])


def test_training_gives_the_same_file_whatever_the_threads_and_hash_seed(tokenizer: Tokenizer) -> None:
    for threads in ("1", "3"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        result = subprocess.run([sys.executable, "-c", TRAIN], env=environment, stdout=subprocess.PIPE, check=True)
        assert hashlib.sha256(result.stdout).hexdigest() == tokenizer.sha256


def test_other_texts_give_another_file(tokenizer: Tokenizer) -> None:
    assert train_bpe([*TEXTS, "something else, something else"], 320).sha256 != tokenizer.sha256


def adversarial_texts() -> list[str]:
    source = random.Random(0)
    return ["".join(source.choices("ab 1\n\t\r.,'s\x1c\x85\u00a0\u2003é中<|>\x00", k=3000)) for _ in range(30)] + ["".join(TEXTS)]


def test_pieces_of_a_long_text_encode_to_the_tokens_of_the_whole(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 40)
    for text in adversarial_texts():
        pieces = list(tokenizer.pieces(text))
        assert len(pieces) > 20 and "".join(pieces) == text
        [whole] = tokenizer.encode([text])
        assert [token for ids in tokenizer.encode(pieces) for token in ids.tolist()] == whole.tolist()


def test_pieces_cut_anywhere_would_change_tokens(tokenizer: Tokenizer) -> None:
    text = "".join(TEXTS)
    [whole] = tokenizer.encode([text])
    anywhere = tokenizer.encode([text[start : start + 40] for start in range(0, len(text), 40)])
    assert [token for ids in anywhere for token in ids.tolist()] != whole.tolist()


def test_training_in_pieces_gives_the_same_file(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_bpe(["".join(TEXTS)], 320)
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 40)
    assert train_bpe(cut_before_white_space("".join(TEXTS)), 320).sha256 == whole.sha256


@pytest.mark.parametrize("eod", ["</s>", "<eos>", "<|end_of_text|>"])
def test_end_of_document_of_a_foreign_tokenizer_is_found_and_its_long_texts_are_not_cut(tmp_path: Path, eod: str) -> None:
    foreign = tokenizers.Tokenizer(models.WordLevel({"a": 0, "unknown": 1, eod: 7}, unk_token="unknown"))
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
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "no_eod.json"))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    for name, reason in (("no_eod.json", "no end-of-document token"), ("broken.json", "not a tokenizer"), ("binary.json", "not a tokenizer")):
        with pytest.raises(DataError, match=f"{name}.*{reason}"):
            load_tokenizer(tmp_path / name)
    with pytest.raises(DataError, match=r"absent\.json cannot be read"):
        load_tokenizer(tmp_path / "absent.json")
