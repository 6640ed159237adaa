"""Sheets are checked before they are scored; scores are those of the definitions."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from nltk.metrics.agreement import AnnotationTask
from nltk.metrics.distance import binary_distance, interval_distance

from pretrain.core.errors import DataError
from pretrain.evaluation.human.agreement import Level, krippendorff_alpha
from pretrain.evaluation.human.form import form, script_json
from pretrain.evaluation.human.score import mean_interval, score_study, sign_test, wilson
from pretrain.evaluation.human.study import (
    Item,
    Key,
    RatedModel,
    SheetOptions,
    key_bytes,
    make_key,
    read_key,
    study_name,
    write_study,
)

MODELS = [RatedModel(checkpoint=name, step=None, manifest=None) for name in ("a", "b")]
# Krippendorff (2011), sections C and D: four observers, twelve units.
PUBLISHED = [
    "1 2 3 3 2 1 4 1 2 . . .".split(),
    "1 2 3 3 2 2 4 1 2 5 . 3".split(),
    ". 3 3 3 2 3 4 2 2 5 1 .".split(),
    "1 2 3 3 2 4 4 1 2 5 1 .".split(),
]


def units_of(table: list[list[str]]) -> list[list[float]]:
    return [
        [float(value) for value in column if value != "."] for column in zip(*table, strict=True)
    ]


def test_alpha_is_that_of_the_published_example() -> None:
    units = units_of(PUBLISHED)
    assert krippendorff_alpha(units, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units, "ordinal") == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha(units, "interval") == pytest.approx(0.849, abs=5e-4)


def test_alpha_equals_that_of_nltk_on_complete_ratings() -> None:
    source = random.Random(1)
    for _ in range(5):
        table = [[source.randint(1, 5) for _ in range(9)] for _ in range(3)]
        data = [
            (rater, unit, value)
            for rater, row in enumerate(table)
            for unit, value in enumerate(row)
        ]
        units = [list(map(float, column)) for column in zip(*table, strict=True)]
        distances: dict[Level, Any] = {
            "nominal": binary_distance,
            "interval": interval_distance,
        }
        for level, distance in distances.items():
            reference = AnnotationTask(data, distance=distance).alpha()
            assert krippendorff_alpha(units, level) == pytest.approx(reference)


def test_alpha_says_nothing_without_pairs_or_differences() -> None:
    assert krippendorff_alpha([[1.0], [2.0]], "nominal") is None
    assert krippendorff_alpha([[2.0, 2.0], [2.0, 2.0]], "ordinal") is None
    assert krippendorff_alpha([], "interval") is None
    assert krippendorff_alpha([[1.0, 1.0], [2.0, 2.0]], "nominal") == 1.0
    assert krippendorff_alpha([[1.0, 2.0], [2.0, 1.0]], "nominal") == pytest.approx(-0.5)


def test_wilson_and_the_sign_test_are_those_of_their_formulas() -> None:
    share, interval = wilson(9, 10)
    z = 1.959963984540054
    middle = (0.9 + z * z / 20) / (1 + z * z / 10)
    half = z * math.sqrt(0.9 * 0.1 / 10 + z * z / 400) / (1 + z * z / 10)
    assert share == 0.9 and interval == pytest.approx([middle - half, middle + half])
    # 10 and 1 of 2^10, on both sides.
    assert sign_test(9, 10) == pytest.approx(2 * 11 / 1024)
    assert wilson(0, 0) == (None, None) and sign_test(0, 0) is None


def test_the_bootstrap_draws_items_and_not_judgements() -> None:
    """Ten raters of four items are no forty independent judgements."""
    source = random.Random(0)
    items = [[float(source.random() < share)] * 10 for share in (0.2, 0.9, 0.4, 0.7)]
    judgements = [[value] for item in items for value in item]
    wide, narrow = mean_interval(items, 0), mean_interval(judgements, 0)
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])
    assert mean_interval(items, 0) == wide
    # Against the interval of the normal approximation, where that holds.
    many = [[float(source.random() < 0.3)] for _ in range(400)]
    share = sum(map(sum, many)) / 400
    half = 1.96 * math.sqrt(share * (1 - share) / 400)
    assert mean_interval(many, 0) == pytest.approx([share - half, share + half], abs=0.01)


def make(tmp_path: Path, models: int = 2, items: int = 6, raters: int = 2) -> Key:
    pairs = [
        Item(prompt=f"p{number}", texts=[f"{number}{name}" for name in "ab"[:models]])
        for number in range(items)
    ]
    options = SheetOptions(tmp_path / "study", ["x"], raters=raters, seed=1)
    key = make_key(pairs, MODELS[:models], options)
    write_study(key, tmp_path / "study")
    return key


def filled(
    tmp_path: Path, key: Key, sheet: str, rater: str, preferred: dict[str, str], name: str = ""
) -> Path:
    """A sheet in which ``preferred`` names the model ("a", "b", "tie") of each item."""
    study = study_name(key_bytes(key))
    rows = ["study,sheet,item,rater,choice,comment"]
    for item, left in key.sheets[sheet].items():
        wanted = preferred.get(item, "")
        side = {"a": "left" if left == 0 else "right", "b": "right" if left == 0 else "left"}
        rows.append(f"{study},{sheet},{item},{rater},{side.get(wanted, wanted)},")
    path = tmp_path / f"{name or rater}.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_wins_are_counted_for_models_wherever_they_are(tmp_path: Path) -> None:
    key = make(tmp_path)
    first = {"1": "a", "2": "a", "3": "a", "4": "b", "5": "tie", "6": "a"}
    second = {"1": "a", "2": "b", "3": "a", "4": "b", "5": "a"}
    sheets = [
        filled(tmp_path, key, "rater_1", "Ann", first),
        filled(tmp_path, key, "rater_2", "bo", second),
    ]
    result = score_study(sheets, tmp_path / "study" / "key.json")
    pairs = result["pairs"]
    assert (pairs["wins"], pairs["losses"], pairs["ties"]) == (7, 3, 1)
    assert pairs["win_rate"] == pytest.approx(7.5 / 11)
    low, high = pairs["win_rate_interval"]
    assert low < 7.5 / 11 < high
    majority = pairs["majority"]
    assert (majority["wins"], majority["losses"], majority["undecided"]) == (4, 1, 1)
    assert majority["share"] == 0.8 and majority["p_value"] == pytest.approx(2 * 6 / 32)
    units = [[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.5, 1.0], [1.0]]
    assert pairs["agreement"]["alpha"] == krippendorff_alpha(units, "nominal")
    assert pairs["agreement"]["units"] == 5
    assert result["unrated"] == 1 and result["raters"]["Ann"]["score"] == pytest.approx(4.5 / 6)
    # The same raters the other way round: nothing depends on the order of the files.
    again = score_study(sheets[::-1], tmp_path / "study" / "key.json")
    assert again["pairs"]["win_rate"] == pairs["win_rate"]


def test_each_sheet_has_an_order_and_sides_of_its_own_and_is_reproducible(tmp_path: Path) -> None:
    key = make(tmp_path, items=40, raters=4)
    assert len({tuple(sheet) for sheet in key.sheets.values()}) == 4
    for sheet in key.sheets.values():
        assert sorted(sheet, key=int) == [str(number) for number in range(1, 41)]
        assert sum(sheet.values()) == 20
    for one, other in itertools.combinations(key.sheets.values(), 2):
        assert any(one[item] != other[item] for item in one)
    options = SheetOptions(tmp_path / "other", ["x"], raters=4, seed=1)
    again = make_key(list(key.items.values()), MODELS, options)
    assert again.sheets == key.sheets and again.salt != key.salt
    other = make_key(
        list(key.items.values()), MODELS, SheetOptions(tmp_path / "o", ["x"], raters=4, seed=2)
    )
    assert other.sheets != key.sheets


def test_equal_texts_are_in_no_sheet(tmp_path: Path) -> None:
    items = [Item(prompt="p", texts=["same", "same"]), Item(prompt="p", texts=["a", "b"])]
    key = make_key(items, MODELS, SheetOptions(tmp_path, ["x"]))
    assert key.identical == 1 and len(key.items) == 1
    with pytest.raises(DataError, match="continued every prompt alike"):
        make_key(items[:1], MODELS, SheetOptions(tmp_path, ["x"]))


def test_ratings_have_means_intervals_and_ordinal_agreement(tmp_path: Path) -> None:
    key = make(tmp_path, models=1)
    study = study_name(key_bytes(key))
    paths = []
    for rater, values in (("Ann", (5, 4, 3, 2)), ("Bo", (5, 4, 2, 2))):
        rows = ["study\tsheet\titem\trater\tfluency\tcoherence\trelevance"]
        rows += [
            f"{study}\trater_1\t{item}\t{rater}\t{value}\t\t3"
            for item, value in enumerate(values, start=1)
        ]
        paths.append(tmp_path / f"{rater}.csv")
        paths[-1].write_text("\n".join(rows))
    result = score_study(paths, tmp_path / "study" / "key.json")
    fluency = result["criteria"]["fluency"]
    assert fluency["mean"] == pytest.approx(27 / 8)
    assert fluency["counts"] == {"2": 3, "3": 1, "4": 2, "5": 2}
    units = [[5.0, 5.0], [4.0, 4.0], [3.0, 2.0], [2.0, 2.0]]
    assert fluency["agreement"]["alpha"] == krippendorff_alpha(units, "ordinal")
    # Nobody rated coherence; everybody gave the same for relevance.
    assert "coherence" not in result["criteria"]
    assert result["criteria"]["relevance"]["agreement"]["alpha"] is None
    assert result["criteria"]["relevance"]["interval"] == [3.0, 3.0]


GOOD = "STUDY,rater_1,1,Ann,left,\n"
HEAD = "study,sheet,item,rater,choice,comment\n"


@pytest.mark.parametrize(
    "content,said",
    [
        ("", "is empty"),
        ("a,b\n1,2\n", "has no column 'study'"),
        (HEAD.replace("comment", "choice") + GOOD, "names a column twice"),
        (HEAD, "nothing is rated"),
        (HEAD + GOOD.replace("left", ""), "nothing is rated"),
        (HEAD + GOOD.replace("STUDY", "sha256:0"), "line 2 is of the study sha256:0"),
        (HEAD + GOOD.replace("rater_1", "rater_9"), "which the key does not have"),
        (HEAD + GOOD.replace(",1,", ",99,"), "item '99'"),
        (HEAD + GOOD.replace("left", "middle"), "the choice 'middle'"),
        (HEAD + GOOD.replace("Ann", " "), "names no rater"),
        (HEAD + GOOD.replace("Ann", "A" * 99), "names no rater (of at most 80"),
        (HEAD + GOOD + GOOD, "'Ann' rates item 1 twice"),
        (HEAD + GOOD + GOOD.replace("Ann", "aNN").replace("left", "tie"), "rates item 1 twice"),
        (HEAD + GOOD[:-1] + ",,extra\n", "has 8 cells under 6 columns"),
        (HEAD + 'STUDY,rater_1,1,"Ann"x,left,\n', "is a damaged CSV"),
        (HEAD + 'STUDY,rater_1,1,"Ann,left,\n', "is a damaged CSV"),
        (b"\xff\xfe" + HEAD.encode("utf-16-le"), "is not UTF-8"),
    ],
)
def test_a_damaged_sheet_is_refused_in_one_sentence(
    content: str | bytes, said: str, tmp_path: Path
) -> None:
    key = make(tmp_path)
    path = tmp_path / "sheet.csv"
    if isinstance(content, str):
        content = content.replace("STUDY", study_name(key_bytes(key))).encode()
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        score_study([path], tmp_path / "study" / "key.json")
    assert "\n" not in str(caught.value) and "sheet.csv" in str(caught.value)


def test_one_rater_with_two_sheets_and_one_file_twice_are_refused(tmp_path: Path) -> None:
    key = make(tmp_path)
    first = filled(tmp_path, key, "rater_1", "Ann", {"1": "a"})
    second = filled(tmp_path, key, "rater_2", "Ann", {"1": "b"}, name="second")
    for sheets in ([first, second], [first, first]):
        with pytest.raises(DataError, match="'Ann' rates item 1 twice, in .*Ann.csv, line"):
            score_study(sheets, tmp_path / "study" / "key.json")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"models": []}, {"items": {}}, {"sheets": {"rater_1": {"77": 0}}},
        {"sheets": {"rater_1": {"1": 2}}}, {"mode": "ratings"}, {"extra": 1}, {"seed": "1"},
        {"items": {"1": {"prompt": "p", "texts": ["a"]}}},
    ],
)  # fmt: skip
def test_a_damaged_key_is_refused_in_one_sentence(
    change: dict[str, object], tmp_path: Path
) -> None:
    make(tmp_path)
    path = tmp_path / "study" / "key.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="is no key of a study") as caught:
        read_key(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_key(tmp_path / "nowhere.json")
    for content in (b"", b"[]", b"\xff", b"{" * 100_000):
        (tmp_path / "key.json").write_bytes(content)
        with pytest.raises(DataError, match="is no key of a study"):
            read_key(tmp_path / "key.json")


def test_no_text_can_leave_its_element() -> None:
    hostile = "</script><!--<script>&amp;\u2028\u2029 %%DATA%%"
    data = {"items": [{"prompt": hostile}], "question": "?"}
    escaped = script_json(data)
    assert not set("<>&\u2028\u2029") & set(escaped) and json.loads(escaped) == data
    page = form(data)
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "%%HASH%%" not in page and page.count("%%DATA%%") == 1
    (inside,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page)
    assert json.loads(inside) == data
