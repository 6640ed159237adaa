"""Guards of many steps: a loss that climbs without a spike, gradient norms that stay high."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from pretrain.checkpoint.saved_state import wrong_type
from pretrain.config.guards import GuardConfig
from pretrain.guards.detect import Guards, Violation
from pretrain.guards.trend import kendall_and_sen

ON = {"loss_trend": {"action": "warn"}, "spike": None}


def guards(**sections: object) -> Guards:
    return Guards(GuardConfig.model_validate(sections))


def noise_of(seed: int) -> Callable[[], float]:
    """Noise of a small batch: heavy tails, each step depends on the one before."""
    source = random.Random(seed)
    last = 0.0

    def draw() -> float:
        nonlocal last
        tail = source.gauss(0, 1) / math.sqrt(source.gammavariate(3.0, 2.0) / 6)
        last = 0.5 * last + 0.05 * tail
        return last

    return draw


def curve(level: Callable[[int], float], steps: int, seed: int) -> list[float]:
    noise, source = noise_of(seed), random.Random(seed + 1000)
    shift, losses = 0.0, []
    for step in range(steps):
        # Other data now and then.
        if step % 997 == 0:
            shift = source.uniform(-0.1, 0.1)
        losses.append(level(step) + shift + noise())
    return losses


def found(guard: Guards, losses: list[float], first: int = 1) -> list[Violation]:
    return [
        violation
        for step, loss in enumerate(losses, first)
        for violation in guard.look(step, loss, 1.0)
    ]


def falling(step: int) -> float:
    return 2.0 + 9.0 / (1 + step / 20) ** 0.5


def plateau(step: int) -> float:
    return 3.0


def warm_restarts(step: int) -> float:
    """A cosine begins anew every 8,000 steps: the loss jumps with the rate, and falls with it."""
    return falling(step) + 0.4 * (1 + math.cos(math.pi * (step % 8000) / 8000)) / 2


def warmed_restarts(step: int) -> float:
    """The same with 1,500 steps of warm-up, in which the loss rises with the learning rate."""
    place = step % 8000
    rate = place / 1500 if place < 1500 else (1 + math.cos(math.pi * (place - 1500) / 6500)) / 2
    return falling(step) + 0.5 * rate


def one_jump(step: int) -> float:
    return 3.0 if step < 12_500 else 4.5


def climb(step: int) -> float:
    """Project 828's published fault: 3.0 to 10.5 over 15,000 steps, after a good beginning."""
    return max(3.0, falling(step)) if step < 8000 else 3.0 + 7.5 * min(1.0, (step - 8000) / 15_000)


@pytest.mark.parametrize("level", [falling, plateau, warm_restarts, warmed_restarts])
@pytest.mark.parametrize("seed", range(6))
def test_falling_even_and_restarted_losses_trip_nothing(
    level: Callable[[int], float], seed: int
) -> None:
    assert found(guards(**ON), curve(level, 25_000, seed)) == []


def test_a_single_jump_between_even_levels_is_a_spike_and_no_trend() -> None:
    noise = noise_of(7)
    losses = [one_jump(step) + noise() for step in range(25_000)]
    assert found(guards(**ON), losses) == []
    assert found(guards(), losses)[0].guard == "spike"


def test_a_recorded_run_trips_nothing_in_windows_of_any_length() -> None:
    lines = (Path(__file__).with_name("recorded_losses.csv")).read_text().splitlines()
    losses = [float(line.split(",")[0]) for line in lines if line[0].isdigit()]
    for window_steps in (200, 500, 1000, 2000):
        guard = guards(spike=None, loss_trend={"window_steps": window_steps, "min_rise": 0.05})
        assert found(guard, losses) == []


@pytest.mark.parametrize("seed", range(6))
def test_a_climb_over_thousands_of_steps_is_found_within_a_window(seed: int) -> None:
    losses = curve(climb, 23_000, seed)
    # The guards of single steps see an outlier of the noise at most, and nothing of the climb.
    assert len(found(guards(grad_norm={"max": 10.0}), losses)) <= 1
    violations = found(guards(**ON), losses)
    assert 9000 < violations[0].step <= 13_000
    # The lowest block of the window is before the climb, or in its first steps: other data moved
    # the even loss by up to 0.1.
    assert all(4000 <= violation.from_step <= 9300 for violation in violations)
    # It is said again at every block, and counted.
    assert [violation.in_a_row for violation in violations] == [
        *range(1, len(violations) + 1),
    ]
    assert {later.step - one.step for one, later in pairwise(violations)} == {250}
    assert "the loss rose over the last 5000 steps, from about" in violations[0].reason


def test_the_trend_takes_its_action_after_as_many_decisions_as_the_recipe_says() -> None:
    losses = [3.0 + step / 1000 for step in range(400)]
    guard = guards(
        loss_trend={"window_steps": 200, "min_rise": 0.1, "action": "stop", "in_a_row": 3}
    )
    assert guard.may_skip
    assert [(one.step, one.action) for one in found(guard, losses)][:4] == [
        (200, "warn"),
        (210, "warn"),
        (220, "stop"),
        (230, "stop"),
    ]
    flat = guards(loss_trend={"window_steps": 200, "min_rise": 0.2})
    # It rises by 0.19 over a window: under the limit.
    assert found(flat, losses) == []


def test_gradient_norms_that_stay_high_are_found_and_single_ones_are_not() -> None:
    source = random.Random(3)
    healthy = [math.exp(source.gauss(0.5, 0.6)) for _ in range(4000)]
    spiky = [norm * 50 if step % 3 == 0 else norm for step, norm in enumerate(healthy)]
    high = [norm * 12 for norm in healthy]
    for norms, steps in ((healthy, []), (spiky, []), (high, [500 * n for n in range(1, 9)])):
        guard = guards(spike=None, sustained_grad_norm={"max": 10.0})
        violations = [
            one for step, norm in enumerate(norms, 1) for one in guard.look(step, 3.0, norm)
        ]
        assert [one.step for one in violations] == steps
        assert {one.from_step for one in violations} == ({1} if steps else set())
    assert "the median gradient norm of the last 500 steps, " in violations[0].reason


def test_a_resumed_guard_of_many_steps_decides_as_an_uninterrupted_one() -> None:
    losses = curve(climb, 13_000, seed=1)
    norms = [20.0 if step > 3000 else 1.0 for step in range(13_000)]
    sections = {
        "loss_trend": {"window_steps": 2000},
        "sustained_grad_norm": {"window_steps": 300, "in_a_row": 2},
    }
    whole = guards(**sections)
    expected = [
        one
        for step in range(1, 13_001)
        for one in whole.look(step, losses[step - 1], norms[step - 1])
    ]
    assert {one.guard for one in expected} == {"loss_trend", "sustained_grad_norm"}
    for at in (1, 99, 3050, 9977):
        before, after = guards(**sections), guards(**sections)
        seen = [
            one
            for step in range(1, at + 1)
            for one in before.look(step, losses[step - 1], norms[step - 1])
        ]
        state = json.loads(json.dumps(before.state()))
        assert wrong_type({"step": at, "guards": state}) is None
        after.restore(state)
        seen += [
            one
            for step in range(at + 1, 13_001)
            for one in after.look(step, losses[step - 1], norms[step - 1])
        ]
        assert seen == expected and after.state() == whole.state()
    # A guard that forgets sees the climb later.
    late = guards(**sections)
    assert [
        one
        for step in range(9978, 13_001)
        for one in late.look(step, losses[step - 1], norms[step - 1])
    ] != [one for one in expected if one.step >= 9978]


def test_a_state_of_another_window_or_of_uneven_lists_begins_anew() -> None:
    guard = guards(loss_trend={"window_steps": 400}, spike=None)
    found(guard, [3.0] * 399)
    state = json.loads(json.dumps(guard.state()))
    other = guards(loss_trend={"window_steps": 200}, spike=None)
    other.restore(state)
    assert other.state()["trend"]["medians"] == [] and len(state["trend"]["medians"]) == 19
    state["trend"]["first_steps"].pop()
    guard.restore(state)
    assert guard.state()["trend"]["medians"] == []
    assert found(guard, [math.nan, math.inf]) == [] and guard.state()["trend"]["values"] == []


def test_tau_and_slope_are_those_of_scipy() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    source = random.Random(0)
    for _ in range(20):
        values = [0.1 * place + source.gauss(0, 0.5) for place in range(20)]
        tau, slope = kendall_and_sen(values)
        assert tau == pytest.approx(scipy_stats.kendalltau(range(20), values).statistic)
        assert slope == pytest.approx(scipy_stats.theilslopes(values).slope)


def test_numbers_that_mean_nothing_are_refused() -> None:
    for wrong in (
        {"loss_trend": {"window_steps": 130}},
        {"loss_trend": {"action": "skip"}},
        {"sustained_grad_norm": {"max": 0}},
    ):
        with pytest.raises(ValueError, match="loss_trend|sustained_grad_norm"):
            guards(**wrong)
