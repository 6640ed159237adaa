"""Documents that share an n-gram with an evaluation file are dropped, and no others."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.cleaning.cleaner import Cleaner
from data_pipeline.cleaning.config import Cleaning, Decontaminate
from data_pipeline.cleaning.decontaminate import Decontaminator
from data_pipeline.cleaning.ngrams import hash_ngrams, hash_words, words_of
from data_pipeline.cleaning.stage import Cleaned
from pretrain.core.errors import ConfigError, DataError

WORDS = [f"word{number}" for number in range(40)]
QUESTION = " ".join(WORDS[:20])


def stage(*paths: Path | str, **fields: object) -> Decontaminator:
    return Decontaminator(
        Decontaminate.model_validate({"against": [str(path) for path in paths]} | fields)
    )


def test_thirteen_shared_words_are_contamination_and_twelve_are_not(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text(QUESTION)
    check = stage(tmp_path / "test.txt")
    found = check("before " + " ".join(WORDS[4:17]) + " after")
    assert found.dropped == "contaminated"
    assert (
        found.detail == f"1 n-grams of 13 words are in {tmp_path / 'test.txt'} too, the first:"
        f" {' '.join(WORDS[4:17])}"
    )
    text = "before " + " ".join(WORDS[4:16]) + " after"
    assert check(text) == Cleaned(text)
    assert stage(tmp_path / "test.txt", ngram_words=12)(text).dropped == "contaminated"


def test_case_punctuation_and_line_ends_do_not_hide_a_copy(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text(QUESTION)
    assert (
        stage(tmp_path / "test.txt")(",\n ".join(WORDS[:20]).upper() + "?!").dropped
        == "contaminated"
    )
    assert stage(tmp_path / "test.txt")(" ".join(reversed(WORDS))).dropped is None


def test_jsonl_files_are_read_record_by_record_and_compressed_ones_too(tmp_path: Path) -> None:
    records = [{"q": {"text": " ".join(WORDS[start : start + 20])}} for start in (0, 20)]
    content = "\n".join(map(json.dumps, records)).encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "c.jsonl.zst").write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    for path in sorted(tmp_path.iterdir()):
        check = stage(path, text_field="q.text")
        assert check(" ".join(WORDS[21:37])).dropped == "contaminated"
        # The end of one record and the start of the next are not neighbours.
        assert check(" ".join(WORDS[14:27])).dropped is None


def test_the_detail_names_the_file_among_several(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(" ".join(f"{number}{word}" for word in WORDS))
    check = stage(tmp_path / "*.txt")
    assert str(tmp_path / "1.txt") in check(" ".join(f"1{word}" for word in WORDS)).detail


def test_evaluation_texts_that_are_too_short_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "test.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in (QUESTION, "too short", "short too"))
    )
    with caplog.at_level(logging.WARNING):
        stage(tmp_path / "test.jsonl")
    assert "2 of 3 texts are shorter than 13 words" in caplog.text
    (tmp_path / "only.txt").write_text("too short")
    with pytest.raises(ConfigError, match=r"no text in .*only\.txt has 13 words"):
        stage(tmp_path / "only.txt")


def test_evaluation_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"against: .*gone\.txt matches no file"):
        Cleaner(Cleaning(decontaminate=Decontaminate(against=[str(tmp_path / "gone.txt")])))
    (tmp_path / "test.csv").write_text(QUESTION)
    with pytest.raises(ConfigError, match=r"test\.csv is neither \.txt nor \.jsonl"):
        stage(tmp_path / "test.csv")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": QUESTION}) + '\n{"text": 1}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: not_a_string"):
        stage(tmp_path / "bad.jsonl")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(QUESTION.encode())[:-12])
    with pytest.raises(DataError, match=r"cut\.txt\.gz.*damaged_compression"):
        stage(tmp_path / "cut.txt.gz")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "ab", "ba"]), max_size=12), st.integers(1, 5))
def test_hashes_of_ngrams_are_equal_exactly_where_the_ngrams_are(
    words: list[str], size: int
) -> None:
    hashes = hash_ngrams(hash_words(words_of(" ".join(words))), size).tolist()
    ngrams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    assert len(hashes) == len(ngrams)
    assert len(set(zip(hashes, ngrams))) == len(set(hashes)) == len(set(ngrams))


def test_words_are_lower_case_runs_of_letters_and_digits_of_any_script() -> None:
    found = [
        word.decode() for word in words_of("The «Straße», naïve_x-2… Ünï\u3000日本語、カナ don't")
    ]
    assert found == [
        "the",
        "straße",
        "naïve_x",
        "2",
        "ünï",
        "日",
        "本",
        "語",
        "カ",
        "ナ",
        "don",
        "t",
    ]
