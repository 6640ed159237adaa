"""Every pair of kinds, options and ways to train works together: it trains, resumes from its
checkpoint, and its weights generate.

A sample of the rows, which has every value and more than half of the pairs, runs always, all of
them with ``-m full``. The rows take seconds to find, so that they are found by the tests, not by
every process that collects them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.covering_rows import pairs_of
from tests.support.model_kinds import CASES, registered
from tests.support.option_pairs import (
    OWN,
    PARAMETERS,
    WORLD_SIZE,
    Choice,
    Row,
    allowed_pairs,
    chosen_overrides,
    name_of,
    overrides_of,
    possible_pairs,
    refusal,
    rows,
    sample,
)  # fmt: skip
from tests.support.ranks import Results, run_cases

# Deliberate faults of resuming, which the equality below must notice, and the options they need.
BROKEN = {"optimizer_forgotten": (), "counts_forgotten": (("dropout", "on"),)}


def case(row: Row, folder: Path, **extra: str) -> dict[str, Any]:
    return {
        "name": name_of(row),
        "folder": str(folder),
        "overrides": overrides_of(row),
        "zero": int((OWN | dict(row))["zero"]),
        **extra,
    }


def results_of(chosen: Sequence[Row], folder: Path, broken: Sequence[str] = ()) -> Results:
    """Of rows by their names, and of deliberately broken cases by the names of their faults."""
    cases = [case(row, folder / str(number)) for number, row in enumerate(chosen)]
    cases += [
        case(BROKEN[fault], folder / fault, sabotage=fault) | {"name": fault} for fault in broken
    ]
    return run_cases("option_pairs", cases, WORLD_SIZE, folder)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of(sample(), tmp_path_factory.mktemp("sample"), list(BROKEN))


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Results:
    others = [row for row in rows() if row not in sample()]
    return results_of(others, tmp_path_factory.mktemp("rest"))


every_row = pytest.mark.parametrize("part", ["quick", pytest.param("rest", marks=pytest.mark.full)])


@pytest.fixture
def found(part: str, request: pytest.FixtureRequest) -> list[tuple[Row, dict[str, Any]]]:
    """Each row of a part, and its result."""
    results: Results = request.getfixturevalue(part)
    chosen = [row for row in rows() if (row in sample()) == (part == "quick")]
    return [(row, results[name_of(row)]) for row in chosen]


def test_the_parameters_hold_every_registered_kind_and_option() -> None:
    values = {(name, value) for name, choices in PARAMETERS.items() for value in choices}
    assert set(registered()) <= values
    overrides = [chosen_overrides((choice,)) for choice in values]
    assert all(expected in overrides or not expected for expected in CASES.values())


def test_the_rows_hold_every_allowed_pair_and_nothing_refused() -> None:
    shown: set[Row] = set().union(*map(pairs_of, rows()))
    assert allowed_pairs() <= shown
    assert not shown & (possible_pairs() - allowed_pairs())
    assert [refusal(row) for row in rows()] == [None] * len(rows())
    assert len(rows()) == len({name_of(row) for row in rows()})


def test_the_sample_has_every_value_and_most_pairs() -> None:
    choices = {choice for row in sample() for choice in row}
    assert choices == {(name, value) for name, values in PARAMETERS.items() for value in values}
    pairs: set[Row] = set().union(*map(pairs_of, sample()))
    assert len(sample()) <= len(rows()) / 6
    assert len(pairs & allowed_pairs()) > 0.6 * len(allowed_pairs())


def names_in(choice: Choice) -> list[str]:
    """What a sentence may call a choice."""
    name, value = choice
    if name == "zero":
        return [f"ZeRO stage {value}"]
    return [
        override.partition("=")[0].removesuffix(".kind") for override in chosen_overrides((choice,))
    ]


def test_a_refused_pair_is_refused_for_a_reason_that_names_one_of_the_two() -> None:
    refused = possible_pairs() - allowed_pairs()
    assert refused
    for pair in refused:
        assert refusal((pair[0],)) is None and refusal((pair[1],)) is None
        assert any(name in refusal(pair) for choice in pair for name in names_in(choice)), pair


def check(found: list[tuple[Row, dict[str, Any]]], holds: Callable[[Row, Any], bool]) -> None:
    """Every row has to hold; all that do not are named."""
    assert found
    assert [name_of(row) for row, result in found if not holds(row, result)] == []


@every_row
def test_the_loss_falls(found: list[tuple[Row, dict[str, Any]]]) -> None:
    def falls(_: Row, result: dict[str, Any]) -> bool:
        losses = [loss for loss, *_ in result["curve"]]
        finite = all(math.isfinite(value) for *values, _ in result["curve"] for value in values)
        return finite and losses[-1] < losses[0] - 0.3

    check(found, falls)


@every_row
def test_a_resumed_run_repeats_every_bit(found: list[tuple[Row, dict[str, Any]]]) -> None:
    """Losses, gradient norms and the experts' loads, with dropout and noise; the run that was not
    interrupted was evaluated in between.
    """

    def repeats(_: Row, result: dict[str, Any]) -> bool:
        return (
            result["damage"] is None
            and result["resumed"] == result["curve"][result["resumed_at"] :]
            and result["resumed_validation"] == result["validation"]
        )

    check(found, repeats)


@every_row
def test_the_weights_alone_give_the_engine_s_loss(found: list[tuple[Row, dict[str, Any]]]) -> None:
    def agrees(row: Row, result: dict[str, Any]) -> bool:
        # The weights are fp32, the engine computed in the row's precision.
        tolerance = 1e-3 if ("precision", "bf16") in row else 1e-6
        near = result["loaded_loss"] == pytest.approx(result["validation"], rel=tolerance)
        return bool(result["same_recipe"] and near)

    check(found, agrees)


@every_row
def test_the_cache_changes_no_token(found: list[tuple[Row, dict[str, Any]]]) -> None:
    def agrees(_: Row, result: dict[str, Any]) -> bool:
        same = result["cached_text"] == result["text"]
        return bool(
            same and result["cached_difference"] < 1e-4 < 1e-2 < result["forgetful_difference"]
        )

    check(found, agrees)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_resume_is_noticed(quick: Results, fault: str) -> None:
    whole, resumed = quick[fault]["curve"][quick[fault]["resumed_at"] :], quick[fault]["resumed"]
    assert resumed != whole
    assert (
        quick[fault]["resumed_validation"] == quick[fault]["validation"]
    )  # the weights are not what differs
