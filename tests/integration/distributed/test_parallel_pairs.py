"""Every pair of ways to spread a training that the rules allow trains on four ranks as on one.

The ways are the axes of ``docs/figures/combinations.py``, which the page ``docs/combinations.md``
shows. Rows that have every value once run always, all rows with ``-m full``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import mean

import combinations
import pytest

from tests.support.covering_rows import Row, covering_rows, pairs_of, spanning_rows
from tests.support.ranks import Case, Results, run_cases
from tests.support.training_cases import SGD, difference

STEPS = 6
# What decides the losses of a run; the other axes only say where and how it is computed.
DECISIVE = ("MoE layer", "precision")
VALUES = {
    name: [
        value
        for value, setting in axis.values.items()
        if not setting.needs_gpu and combinations.refusal((name, value)) is None
    ]
    for name, axis in combinations.AXES.items()
}
OWN = {name: values[0] for name, values in VALUES.items()}
BROKEN = (("MoE layer", "dropless"), ("ep_size", "2"))


def refusal(row: Row) -> str | None:
    return combinations.refusal(*row)


@cache
def allowed_pairs() -> frozenset[Row]:
    return frozenset(
        pair
        for pair in combinations.possible_pairs()
        if all(value in VALUES[name] for name, value in pair) and refusal(pair) is None
    )


@cache
def rows() -> tuple[Row, ...]:
    return covering_rows(VALUES, allowed_pairs(), refusal)


@cache
def sample() -> tuple[Row, ...]:
    """Rows with every value, and two more of those that are compared exactly."""
    spanning = spanning_rows(VALUES, rows())
    exact = [row for row in rows() if ("precision", "fp32") in row and row not in spanning]
    return (*spanning, *random.Random(0).sample(exact, min(2, len(exact))))


def name_of(row: Row) -> str:
    named = [f"{name}={value}" for name, value in row if value != OWN[name]]
    return ", ".join(named) or "every first value"


def reference_of(row: Row, **changed: str) -> Row:
    """What one rank trains at ZeRO 0 with nothing recomputed, to the same losses."""
    decisive = {name: dict(row).get(name, OWN[name]) for name in DECISIVE}
    return tuple((decisive | changed | {"ZeRO stage": "0"}).items())


def case(row: Row, **extra: object) -> Case:
    sections = combinations.ds_config_of(row)
    zero = sections.pop("zero_optimization")
    return {
        "name": name_of(row),
        "overrides": [*combinations.overrides_of(row), SGD],
        "zero": zero["stage"],
        "sections": sections,
        "steps": STEPS,
        **extra,
    }


def results_of(
    chosen: Sequence[Row], folder: Path, broken: bool = False
) -> tuple[Results, Results]:
    """Of the rows on four ranks, and of their references on one, by name."""
    cases = [case(row) for row in chosen]
    if broken:
        cases.append(case(BROKEN, sabotage="expert_gradient_scaled") | {"name": "broken"})
    references = {reference_of(row) for row in (*chosen, BROKEN)}
    # Low precision is compared with fp32.
    references |= {reference_of(row, precision="fp32") for row in chosen}
    alone = [case(row) for row in sorted(references)]
    return (
        run_cases("training_steps", cases, combinations.WORLD_SIZE, folder / "four"),
        run_cases("training_steps", alone, 1, folder / "one"),
    )


def check(chosen: Sequence[Row], found: tuple[Results, Results]) -> None:
    """Every row has to have its reference's losses; all that have not are named."""
    results, references = found
    different: dict[str, float] = {}
    for row in chosen:
        result = results[name_of(row)]
        assert all(result["applied"]), name_of(row)
        if dict(row)["precision"] == "fp32":
            distance = difference(result, references[name_of(reference_of(row))]) / 1e-6
        else:
            # Another rank rounds other sums: only the mean is near.
            exact = references[name_of(reference_of(row, precision="fp32"))]
            distance = abs(mean(result["nll"]) / mean(exact["nll"]) - 1) / 1e-3
        if distance > 1:
            different[name_of(row)] = distance
    assert different == {}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    return results_of(sample(), tmp_path_factory.mktemp("sample"), broken=True)


def test_the_rows_hold_every_allowed_pair_and_nothing_refused() -> None:
    shown: set[Row] = set().union(*map(pairs_of, rows()))
    assert shown == allowed_pairs()
    assert [refusal(row) for row in rows()] == [None] * len(rows())
    assert len({name_of(row) for row in rows()}) == len(rows())
    assert {choice for row in sample() for choice in row} == {
        (name, value) for name, values in VALUES.items() for value in values
    }


def test_rows_with_every_value_train_on_four_ranks_as_on_one(
    quick: tuple[Results, Results],
) -> None:
    check(sample(), quick)


def test_an_expert_gradient_that_is_one_percent_too_large_is_noticed(
    quick: tuple[Results, Results],
) -> None:
    results, references = quick
    assert difference(results["broken"], references[name_of(reference_of(BROKEN))]) > 1e-6


@pytest.mark.full
def test_every_allowed_pair_trains_on_four_ranks_as_on_one(tmp_path: Path) -> None:
    rest = [row for row in rows() if row not in sample()]
    check(rest, results_of(rest, tmp_path))
