"""Learning-rate factors at the steps where a schedule changes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated

import pytest
from pydantic import TypeAdapter

from pretrain.config.load import load_recipe
from pretrain.config.schedules import PhaseSchedule, ScheduleConfig
from pretrain.config.timeline import Timeline
from pretrain.core.registry import OneOf
from pretrain.training.schedules import run_learning_rate_factor

STEPS, WARMUP, FLOOR = 100, 10, 0.1
SCHEDULES: TypeAdapter[ScheduleConfig] = TypeAdapter(Annotated[ScheduleConfig, OneOf()])
PHASES: TypeAdapter[PhaseSchedule] = TypeAdapter(Annotated[PhaseSchedule, OneOf()])


def factor(step: int, kind: str, **fields: float) -> float:
    config: ScheduleConfig = SCHEDULES.validate_python(
        {"kind": kind, "warmup_steps": WARMUP, "min_learning_rate_ratio": FLOOR, **fields}
    )
    return config.factor(step, STEPS)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_is_linear_and_then_the_peak_is_reached(kind: str) -> None:
    assert factor(0, kind) == pytest.approx(1 / 11)
    assert factor(4, kind) == pytest.approx(5 / 11)
    assert factor(9, kind) == pytest.approx(10 / 11)
    assert factor(10, kind) == 1.0


@pytest.mark.parametrize(
    "kind,step,expected",
    [
        ("constant", 99, 1.0),
        ("linear", 55, FLOOR + 0.9 * 0.5),
        ("linear", 99, FLOOR + 0.9 / 90),
        ("linear", 100, FLOOR),
        ("cosine", 40, FLOOR + 0.9 * (1 + math.cos(math.pi / 3)) / 2),
        ("cosine", 55, FLOOR + 0.9 * 0.5),
        ("cosine", 100, FLOOR),
        ("wsd", 79, 1.0),  # the last fifth decays
        ("wsd", 80, 1.0),
        ("wsd", 90, FLOOR + 0.9 * 0.5),
        ("wsd", 99, FLOOR + 0.9 / 20),
        ("wsd", 100, FLOOR),
    ],
)
def test_shapes_by_hand(kind: str, step: int, expected: float) -> None:
    assert factor(step, kind) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_the_factor_never_rises_after_the_warm_up_and_never_falls_below_its_floor(
    kind: str,
) -> None:
    factors = [factor(step, kind) for step in range(WARMUP, STEPS + 20)]
    assert factors == sorted(factors, reverse=True)
    assert min(factors) == pytest.approx(FLOOR)


def test_wsd_decays_over_its_share() -> None:
    assert factor(40, "wsd", decay_share=0.6) == 1.0
    assert factor(70, "wsd", decay_share=0.6) == pytest.approx(FLOOR + 0.9 * 0.5)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert factor(0, "cosine", warmup_steps=0) == 1.0


def test_a_run_that_is_all_warm_up_has_no_division_by_zero() -> None:
    assert factor(99, "cosine", warmup_steps=100) == pytest.approx(100 / 101)
    assert factor(100, "cosine", warmup_steps=100) == 1.0


# --- phases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "half"),
    [
        ("constant", 1.0),
        ("linear", 0.6),
        ("cosine", 0.6),
        ("sqrt", 0.2 + 0.8 * (1 - math.sqrt(0.5))),
    ],
)
def test_a_phase_goes_from_its_start_to_its_end(kind: str, half: float) -> None:
    end_ratio = 0.0 if kind == "constant" else 0.2
    config = PHASES.validate_python({"kind": kind, "end_ratio": end_ratio})
    factors = [config.factor(step, 100) for step in range(100)]
    assert factors[0] == 1.0 and factors[50] == pytest.approx(half)
    assert all(later <= earlier for earlier, later in pairwise(factors))
    assert kind == "constant" or factors[99] == pytest.approx(0.2, abs=0.01)


def test_a_phase_may_warm_up() -> None:
    config = PHASES.validate_python({"kind": "linear", "start_ratio": 0.0, "end_ratio": 1.0})
    assert [config.factor(step, 4) for step in range(4)] == [
        0.0,
        0.25,
        0.5,
        0.75,
    ]


def test_a_trunk_with_a_linear_decay_is_wsd_to_the_last_bit() -> None:
    wsd = load_recipe(
        "debug",
        ["schedule={kind: wsd, warmup_steps: 3, decay_share: 0.25, min_learning_rate_ratio: 0.1}"],
    )
    decay = (
        "phases=[{name: stable, tokens: 7680}, {name: decay, schedule: {kind: linear, end_ratio:"
        " 0.1}}]"
    )
    phased = load_recipe("debug", ["schedule={kind: constant, warmup_steps: 3}", decay])
    factors = [
        [run_learning_rate_factor(step, Timeline(recipe), recipe.schedule) for step in range(20)]
        for recipe in (wsd, phased)
    ]
    assert factors[0] == factors[1] and factors[0][0] == 0.25 and factors[0][-1] < 0.3
    other = load_recipe(
        "debug", ["schedule={kind: constant, warmup_steps: 3}", decay, "phases.0.tokens=7168"]
    )
    assert [
        run_learning_rate_factor(step, Timeline(other), other.schedule) for step in range(20)
    ] != factors[0]
