"""Train and validation by a hash of each document."""

from __future__ import annotations

import pytest

from data_pipeline.shards.split import SplitPlan, cut_at_line_end, plan_split, position, text_digest
from pretrain.core.errors import DataError

KEYS = [f"folder/{number}.txt" for number in range(2000)]


def place(key: str) -> float:
    return position(0, key)


def plan(keys: list[str], share: float) -> SplitPlan:
    """The plan of a corpus in which every document is a unit of its own."""
    return plan_split(share, "path", len(keys), map(place, keys))


def sides(keys: list[str], share: float) -> list[str]:
    chosen = plan(keys, share)
    return [chosen.assign("text", place(key))[0][0] for key in keys]


def test_adding_documents_moves_none() -> None:
    assert sides(KEYS[:200], 0.1) == sides(KEYS, 0.1)[:200]


def test_raising_the_share_only_moves_documents_into_validation() -> None:
    small, large = (
        {key for key, side in zip(KEYS, sides(KEYS, share), strict=True) if side == "validation"}
        for share in (0.05, 0.2)
    )
    assert small < large


def test_share_is_met_within_four_standard_deviations() -> None:
    assert abs(sides(KEYS, 0.1).count("validation") - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5


def test_without_a_name_the_text_decides() -> None:
    texts = [f"text number {number}" for number in range(1000)]
    places = [position(text_digest(text)) for text in texts]
    assert (
        len(set(places)) == 1000
        and 0.4 < sum(places) / 1000 < 0.6
        and 0 <= min(places) <= max(places) < 1
    )


@pytest.mark.parametrize(("share", "split"), [(1e-9, "validation"), (1 - 1e-9, "train")])
def test_neither_split_is_empty_and_the_document_nearest_to_the_border_moves(
    share: float, split: str
) -> None:
    keys = KEYS[:5]
    moved = min(keys, key=place) if split == "validation" else max(keys, key=place)
    assert [key for key, side in zip(keys, sides(keys, share), strict=True) if side == split] == [
        moved
    ]


def test_a_notice_says_what_was_moved() -> None:
    assert plan(KEYS, 0.1).notice("path") is None
    assert (plan(KEYS[:5], 1e-9).notice("path") or "").endswith(
        "the documents of the path with the lowest are held out"
    )
    assert (plan(KEYS[:5], 1 - 1e-9).notice("content") or "").endswith(
        "the one with the highest is trained on"
    )


def test_without_a_share_nothing_is_held_out() -> None:
    assert set(sides(KEYS[:1], 0.0)) == set(sides(KEYS, 0.0)) == {"train"}


def test_a_single_document_is_cut_in_two() -> None:
    text = "".join(f"line {number}\n" for number in range(100))
    parts = dict(plan(["only.txt"], 0.1).assign(text, 0.5))
    assert list(parts) == ["train", "validation"]
    assert parts["train"] + parts["validation"] == text
    assert parts["train"].endswith("\n") and 0.08 < len(parts["validation"]) / len(text) < 0.12


@pytest.mark.parametrize(
    "text", ["ab", "a\n", "no line end at all", "title\n" + "x" * 1000, "x" * 1000 + "\n", "\n\n\n"]
)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_cut_loses_nothing_and_leaves_two_parts(text: str, share: float) -> None:
    first, second = cut_at_line_end(text, share)
    assert first and second and first + second == text


def test_a_far_away_line_end_does_not_halve_a_part() -> None:
    first, _ = cut_at_line_end("title\n" + "x" * 1000, 0.9)
    assert len(first) > 800


def test_one_character_cannot_be_cut() -> None:
    with pytest.raises(DataError, match="one character"):
        cut_at_line_end("x", 0.5)
