"""The curve of a learning rate range test is judged where it should be."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from pretrain.run.lr_finder import (
    SLOPE_STEPS,
    evaluate,
    has_diverged,
    learning_rates,
    running_mean,
    slope_steps,
    smooth,
)

RATES = learning_rates(1e-5, 10.0, 121)
FALLS_AT, RISES_AT = 3e-3, 0.5


def losses(noise: float = 0.02, falls_at: float = FALLS_AT) -> list[float]:
    """Falls from 6 to 3 around one learning rate, and explodes above another."""
    source = random.Random(0)
    fall = [3.0 + 3.0 / (1.0 + (rate / falls_at) ** 2) for rate in RATES]
    return [
        loss + 20.0 * (rate / 10.0) ** 2 * (rate > RISES_AT) * 10 + source.gauss(0.0, noise)
        for loss, rate in zip(fall, RATES, strict=True)
    ]


def test_learning_rates_grow_by_one_factor_from_end_to_end() -> None:
    assert (RATES[0], RATES[-1]) == (1e-5, pytest.approx(10.0))
    assert (
        max(abs(after / before - 10 ** (6 / 120)) for before, after in itertools.pairwise(RATES))
        < 1e-9
    )


@pytest.mark.parametrize("falls_at", [3e-4, 3e-3, 3e-2])
def test_the_steepest_descent_is_found_where_it_is_and_not_steps_later(falls_at: float) -> None:
    test = evaluate(RATES, losses(falls_at=falls_at), stopped=False)
    assert test.steepest is not None and abs(math.log(test.steepest / falls_at)) < math.log(1.5)
    assert test.diverged is None and test.suggestion == test.steepest


def test_smoothing_takes_noise_and_shifts_nothing() -> None:
    clean, noisy = losses(noise=0.0)[:80], losses(noise=0.3)[:80]
    assert sum(
        abs(a - b)
        for a, b in zip(smooth(noisy, SLOPE_STEPS), smooth(clean, SLOPE_STEPS), strict=True)
    ) < 0.5 * sum(abs(a - b) for a, b in zip(noisy, clean, strict=True))
    ramp = [float(step) for step in range(60)]
    assert all(
        abs(value - step) < 0.3 for step, value in list(enumerate(smooth(ramp, SLOPE_STEPS)))[20:40]
    )
    assert all(
        step - value > 3.0 for step, value in list(enumerate(running_mean(ramp, 0.8)))[20:40]
    )  # one direction alone lags


def test_the_test_ends_soon_after_the_loss_explodes_and_not_before() -> None:
    curve = losses()
    ends = next(count for count in range(1, len(curve) + 1) if has_diverged(curve[:count]))
    assert RISES_AT < RATES[ends - 1] < 10 * RISES_AT
    test = evaluate(RATES, curve[:ends], stopped=True)
    assert test.diverged is not None and RISES_AT * 0.6 < test.diverged <= RATES[ends - 1]
    assert test.suggestion == min(test.steepest or 0.0, 0.1 * test.diverged)


def test_a_tenth_of_where_it_diverges_is_suggested_where_it_is_the_lower_one() -> None:
    test = evaluate(RATES, losses(falls_at=0.2), stopped=True)
    assert test.steepest is not None and test.diverged is not None
    assert test.suggestion == pytest.approx(0.1 * test.diverged) and test.suggestion < test.steepest


def training_loss(rates: list[float], noise: float, seed: int) -> list[float]:
    """Of a model that learns with each step as far as its learning rate goes, up to where that is
    too high.
    """
    source, loss, found = random.Random(seed), 9.0, []
    for rate in rates:
        loss += (
            -(loss - 4.5) * (1.0 - math.exp(-3000.0 / len(rates) * rate))
            if rate < 0.05
            else (rate - 0.05) * 20
        )
        found.append(loss + source.gauss(0.0, noise))
    return found


@pytest.mark.parametrize("steps", [100, 500, 2000])
def test_noise_moves_the_suggestion_little_with_any_number_of_steps(steps: int) -> None:
    rates = learning_rates(1e-6, 1.0, steps)
    end = next(step for step, rate in enumerate(rates) if rate > 0.15)
    clean = evaluate(rates, training_loss(rates, 0.0, 0)[:end], stopped=False).suggestion
    assert clean is not None
    noisy = [
        evaluate(rates, training_loss(rates, 0.3, seed)[:end], stopped=False).suggestion
        for seed in range(40)
    ]
    assert sum(found is None or not clean / 3 < found < 3 * clean for found in noisy) <= 1


def test_a_slope_is_taken_over_more_steps_where_a_decade_has_more() -> None:
    assert [slope_steps(learning_rates(1e-6, 1.0, steps)) for steps in (20, 101, 2001)] == [
        10,
        10,
        200,
    ]
    assert slope_steps(learning_rates(1e-3, 2e-3, 60)) == 30


def test_a_loss_that_only_rises_gives_no_suggestion() -> None:
    test = evaluate(RATES, [5.0 + 0.01 * step for step in range(60)], stopped=True)
    assert test.steepest is None and test.suggestion is None
    assert evaluate(RATES, [], stopped=True).suggestion is None


def test_a_gradient_that_is_not_finite_marks_the_last_learning_rate() -> None:
    test = evaluate(RATES, losses()[:70], stopped=True)
    assert test.diverged == RATES[69]
