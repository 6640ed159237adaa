"""Learning-rate factors at the steps where a schedule turns."""

from __future__ import annotations

import math

import pytest

from pretrain.config.schema import ScheduleConfig
from pretrain.optim.schedules import learning_rate_factor

STEPS, WARMUP, FLOOR = 100, 10, 0.1


def factor(step: int, kind: str, **fields: float) -> float:
    config = ScheduleConfig.model_validate({"kind": kind, "warmup_steps": WARMUP, "min_learning_rate_ratio": FLOOR, **fields})
    return learning_rate_factor(step, STEPS, config)


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
def test_the_factor_never_rises_after_the_warm_up_and_never_falls_below_its_floor(kind: str) -> None:
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
