from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.core.errors import DataError
from pretrain.evaluation.heldout.references import read_references, score_references


def test_equal_texts_have_the_best_scores_and_unlike_ones_none() -> None:
    texts = ["the cat sat on the mat", "a dog ran over the hill"]
    best = score_references(texts, texts)
    assert (best.texts, best.exact_match) == (2, 1.0)
    assert [best.bleu, best.rouge1, best.rouge2, best.rouge_l] == pytest.approx(
        [100.0, 1.0, 1.0, 1.0]
    )
    worst = score_references(["x y z w v", "p q r s t"], texts)
    assert worst.exact_match == worst.rouge1 == worst.rouge_l == 0.0 and worst.bleu < 5


def test_scores_follow_their_definitions() -> None:
    score = score_references(["the cat the cat on the mat"], ["the cat is on the mat"])
    # Precisions 5/7, 3/6, 1/5 and none of 4 (smoothed to 1/2 of 1/4), no brevity penalty.
    assert score.bleu == pytest.approx(100 * (5 / 7 * 3 / 6 * 1 / 5 * 1 / 8) ** 0.25, rel=1e-6)
    # 5 of 7 and of 6 words, 3 of 6 and of 5 pairs, a common subsequence of 5.
    assert score.rouge1 == pytest.approx(2 * 5 / (7 + 6)) and score.rouge2 == pytest.approx(
        2 * 3 / (6 + 5)
    )
    assert score.rouge_l == pytest.approx(2 * 5 / (7 + 6))
    assert "smooth" in score.bleu_signature and score.exact_match == 0.0


def test_a_file_that_is_no_list_of_pairs_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    for content, words in (
        ("", "has no line"),
        ('{"prompt": "a", "reference": "b"}\n[1]\n', "line 2 is no JSON object"),
        (
            '{"prompt": "a", "reference": "b"}\n{"prompt": "a"}\n',
            'line 2 has no text "prompt" and "reference"',
        ),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=words):
            read_references(path)
    path.write_text('{"prompt": "a", "reference": "b", "id": 3}\n\n')
    assert read_references(path) == (["a"], ["b"])
    with pytest.raises(DataError, match="cannot be read"):
        read_references(tmp_path / "none.jsonl")
