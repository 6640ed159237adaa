"""Every pair of kinds, options and ways to train works together: it trains, resumes from its
checkpoint, and its weights generate.

A quarter of the rows, which has every value and most of the pairs, runs always, all of them with
``-m full``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

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
    pairs_of,
    possible_pairs,
    quarter,
    refusal,
    rows,
)  # fmt: skip
from tests.support.ranks import Results, run_cases

# Deliberate faults of resuming, which the equality below must notice, and the options they need.
BROKEN = {"optimizer_forgotten": (), "random_state_forgotten": (("dropout", "on"),)}


def case(row: Row, folder: Path, **extra: str) -> dict[str, Any]:
    return {
        "name": name_of(row),
        "folder": str(folder),
        "overrides": overrides_of(row),
        "zero": int((OWN | dict(row))["zero"]),
        **extra,
    }


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The quarter, and the deliberately broken cases by the names of their faults."""
    folder = tmp_path_factory.mktemp("quarter")
    cases = [case(row, folder / str(number)) for number, row in enumerate(quarter())]
    broken = [
        case(choices, folder / fault, sabotage=fault) | {"name": fault}
        for fault, choices in BROKEN.items()
    ]
    return run_cases("option_pairs", cases + broken, WORLD_SIZE, folder)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("rest")
    others = [row for row in rows() if row not in quarter()]
    cases = [case(row, folder / str(number)) for number, row in enumerate(others)]
    return run_cases("option_pairs", cases, WORLD_SIZE, folder)


@pytest.fixture
def result(row: Row, request: pytest.FixtureRequest) -> dict[str, Any]:
    results: Results = request.getfixturevalue("quick" if row in quarter() else "rest")
    return results[name_of(row)]


every_row = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=name_of(row), marks=() if row in quarter() else pytest.mark.full)
        for row in rows()
    ],
)


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


def test_the_quarter_has_every_value_and_most_pairs() -> None:
    choices = {choice for row in quarter() for choice in row}
    assert choices == {(name, value) for name, values in PARAMETERS.items() for value in values}
    pairs: set[Row] = set().union(*map(pairs_of, quarter()))
    assert len(quarter()) <= len(rows()) / 4 and len(pairs & allowed_pairs()) > 0.75 * len(
        allowed_pairs()
    )


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


@every_row
def test_the_loss_falls(result: dict[str, Any]) -> None:
    losses = [loss for loss, *_ in result["curve"]]
    assert all(math.isfinite(value) for *values, _ in result["curve"] for value in values)
    assert losses[-1] < losses[0] - 0.3


@every_row
def test_a_resumed_run_repeats_every_bit(result: dict[str, Any]) -> None:
    """Losses, gradient norms and the experts' loads, with dropout and noise; the run that was not
    interrupted was evaluated in between.
    """
    assert result["damage"] is None
    assert result["resumed"] == result["curve"][result["resumed_at"] :]
    assert result["resumed_validation"] == result["validation"]


@every_row
def test_the_weights_alone_give_the_engine_s_loss(row: Row, result: dict[str, Any]) -> None:
    tolerance = (
        1e-6 if ("precision", "bf16") not in row else 1e-3
    )  # the weights are fp32, the engine computed in bf16
    assert result["same_recipe"]
    assert result["loaded_loss"] == pytest.approx(result["validation"], rel=tolerance)


@every_row
def test_the_cache_changes_no_token(result: dict[str, Any]) -> None:
    assert result["cached_text"] == result["text"]
    assert result["cached_difference"] < 1e-4 < 1e-2 < result["forgetful_difference"]


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_resume_is_noticed(quick: Results, fault: str) -> None:
    whole, resumed = quick[fault]["curve"][quick[fault]["resumed_at"] :], quick[fault]["resumed"]
    assert resumed != whole
    assert (
        quick[fault]["resumed_validation"] == quick[fault]["validation"]
    )  # the weights are not what differs
