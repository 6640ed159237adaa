"""Train and validation by a hash of the id."""

from __future__ import annotations

import pytest

from data_pipeline.sources import Document
from data_pipeline.split import SplitPlan, cut_at_line_end, plan_split, position
from pretrain.config.errors import DataError

IDS = [f"folder/{number}.txt" for number in range(2000)]


def side(plan: SplitPlan, document_id: str) -> str:
    [(split, _)] = plan.assign(Document("text", "text", document_id))
    return split


def test_adding_documents_moves_none() -> None:
    few, many = plan_split(IDS[:200], 0.1), plan_split(IDS, 0.1)
    assert [side(few, document_id) for document_id in IDS[:200]] == [side(many, document_id) for document_id in IDS[:200]]


def test_raising_the_share_only_moves_documents_into_validation() -> None:
    small, large = plan_split(IDS, 0.05), plan_split(IDS, 0.2)
    held_out = {document_id for document_id in IDS if side(small, document_id) == "validation"}
    assert held_out < {document_id for document_id in IDS if side(large, document_id) == "validation"}


def test_share_is_met_within_four_standard_deviations() -> None:
    plan = plan_split(IDS, 0.1)
    held_out = sum(side(plan, document_id) == "validation" for document_id in IDS)
    assert abs(held_out - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5


@pytest.mark.parametrize(("share", "split"), [(1e-9, "validation"), (1 - 1e-9, "train")])
def test_neither_split_is_empty_and_the_document_nearest_to_the_border_moves(share: float, split: str) -> None:
    ids = IDS[:5]
    plan = plan_split(ids, share)
    moved = min(ids, key=position) if split == "validation" else max(ids, key=position)
    assert [document_id for document_id in ids if side(plan, document_id) == split] == [moved]


def test_a_single_document_is_cut_in_two() -> None:
    text = "".join(f"line {number}\n" for number in range(100))
    parts = plan_split(["only.txt"], 0.1).assign(Document(text, "text", "only.txt"))
    assert [(split, document.id) for split, document in parts] == [("train", "only.txt#train"), ("validation", "only.txt#validation")]
    train, validation = (document.text for _, document in parts)
    assert train + validation == text
    assert train.endswith("\n") and 0.08 < len(validation) / len(text) < 0.12


@pytest.mark.parametrize("text", ["ab", "a\n", "no line end at all", "title\n" + "x" * 1000, "x" * 1000 + "\n", "\n\n\n"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_cut_loses_nothing_and_leaves_two_parts(text: str, share: float) -> None:
    first, second = cut_at_line_end(text, share)
    assert first and second and first + second == text


def test_a_far_away_line_end_does_not_halve_a_part() -> None:
    first, _ = cut_at_line_end("title\n" + "x" * 1000, 0.9)
    assert len(first) > 800


def test_nothing_to_split_is_an_error() -> None:
    with pytest.raises(DataError, match="no document"):
        plan_split([], 0.1)
    with pytest.raises(DataError, match="one character"):
        cut_at_line_end("x", 0.5)
