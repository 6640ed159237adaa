"""What guards decide, from plain numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from pretrain.config.guards import GuardConfig
from pretrain.guards.detect import Guards, RobustWindow, Violation, severest

Losses = Sequence[float]


def guards(**sections: object) -> Guards:
    return Guards(GuardConfig.model_validate(sections))


def violations(guard: Guards, losses: Losses, norms: Losses | None = None) -> list[Violation]:
    return [
        violation
        for step, loss in enumerate(losses, 1)
        for violation in guard.look(step, loss, norms[step - 1] if norms else 1.0)
    ]


def clean_losses(steps: int, seed: int) -> list[float]:
    """A loss curve as long runs have it: a power law, noise with heavy tails that depends on the
    step before, other data now and then.
    """
    source = random.Random(seed)
    noise, shift, losses = 0.0, 0.0, []
    for step in range(steps):
        # Student's t with six degrees of freedom: of 10,000 numbers about two are above eight of
        # its scales.
        tail = source.gauss(0, 1) / math.sqrt(source.gammavariate(3.0, 2.0) / 6)
        noise = 0.3 * noise + 0.03 * tail
        if step % 997 == 0:
            shift = source.uniform(-0.1, 0.1)
        losses.append(2.0 + 9.0 / (1 + step / 20) ** 0.5 + shift + noise)
    return losses


def test_a_clean_run_of_ten_thousand_steps_trips_nothing() -> None:
    source = random.Random(0)
    norms = [math.exp(source.gauss(-1, 0.4)) for _ in range(10_000)]
    found = violations(
        guards(spike={"action": "skip"}, grad_norm={"deviations": 10.0, "action": "skip"}),
        clean_losses(10_000, seed=0),
        norms,
    )
    assert found == []


@pytest.fixture(scope="module")
def recorded() -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a real run."""
    lines = (Path(__file__).with_name("recorded_losses.csv")).read_text().splitlines()
    rows = [line.split(",") for line in lines if line[0].isdigit()]
    assert len(rows) == 3500
    return [float(loss) for loss, _ in rows], [float(norm) for _, norm in rows]


def test_a_recorded_run_trips_nothing_and_a_spike_in_it_is_found(
    recorded: tuple[list[float], list[float]],
) -> None:
    losses, norms = recorded
    config: dict[str, object] = {
        "spike": {"action": "skip"},
        "grad_norm": {"deviations": 20.0, "action": "skip"},
    }
    assert violations(guards(**config), losses, norms) == []
    for at in (40, 500, 1700, 3400):
        spiked, rising = losses[:], norms[:]
        spiked[at] += 3.0
        rising[at] *= 30.0
        assert [
            (violation.guard, violation.step)
            for violation in violations(guards(**config), spiked, norms)
        ] == [("spike", at + 1)]
        assert [
            (violation.guard, violation.step)
            for violation in violations(guards(**config), losses, rising)
        ] == [("grad_norm", at + 1)]
    # What a step of these 512 tokens is off by is well below the guard's limits.
    assert violations(guards(spike={"action": "skip", "deviations": 2.5}), losses, norms) != []


def test_a_spike_is_found_wherever_it_comes_and_not_what_is_under_the_limits() -> None:
    for at in (300, 500, 999):
        losses = clean_losses(1000, seed=1)
        losses[at] += 3.0
        (violation,) = violations(guards(spike={"action": "skip"}), losses)
        assert (violation.guard, violation.action, violation.step, violation.in_a_row) == (
            "spike",
            "skip",
            at + 1,
            1,
        )
        assert (
            f"its loss {losses[at]:.4f} is" in violation.reason
            and "robust deviations" in violation.reason
        )
        assert violations(guards(spike={"action": "skip", "min_rise": 4.0}), losses) == []
        assert violations(guards(spike={"action": "skip", "deviations": 10_000}), losses) == []
        assert violations(guards(spike=None), losses) == []


def test_a_level_that_stays_becomes_the_normal_one() -> None:
    losses = [3.0 + 0.01 * (step % 5) for step in range(200)] + [
        5.0 + 0.01 * (step % 5) for step in range(200)
    ]
    found = violations(guards(spike={"window_steps": 64}), losses)
    assert [violation.step for violation in found] == list(range(201, 233))
    assert [violation.in_a_row for violation in found] == list(range(1, 33)) and {
        violation.from_step for violation in found
    } == {201}


def test_an_action_waits_for_as_many_spikes_in_a_row_as_the_recipe_says() -> None:
    losses = [3.0 + 0.01 * (step % 5) for step in range(100)]
    losses[60] = losses[70] = losses[71] = losses[72] = 9.0
    found = violations(guards(spike={"action": "rollback", "in_a_row": 3}), losses)
    assert [(violation.step, violation.action) for violation in found] == [
        (61, "warn"),
        (71, "warn"),
        (72, "warn"),
        (73, "rollback"),
    ]
    assert found[-1].from_step == 71


def test_spikes_on_both_sides_of_a_step_that_guards_never_saw_are_in_a_row_from_the_first() -> None:
    guard = guards(spike={"action": "rollback", "in_a_row": 2})
    for step in range(1, 100):
        assert guard.look(step, 3.0 + 0.01 * (step % 5), 1.0) == []
    (told,) = guard.look(100, 9.0, 1.0)
    second = guards(spike={"action": "rollback", "in_a_row": 2})
    second.restore(json.loads(json.dumps(guard.state())))
    for asked in (guard, second):
        (violation,) = asked.look(102, 9.0, 1.0)  # the gradient of step 101 was not finite
        assert (violation.action, violation.in_a_row, violation.from_step) == ("rollback", 2, 100)
    assert (told.action, told.from_step) == ("warn", 100)


def test_gradient_norms_that_hardly_vary_do_not_trip_on_a_rounding() -> None:
    guard = guards(spike=None, grad_norm={"deviations": 10.0})
    assert violations(guard, [3.0] * 42, [0.5] * 40 + [0.5 * (1 + 1e-6), 0.54]) == []
    (violation,) = guard.look(43, 3.0, 0.6)
    assert "1.2 times the median" in violation.reason


def test_a_loss_that_is_no_number_is_a_spike_and_leaves_the_window_alone() -> None:
    guard = guards(spike={"action": "skip"})
    (violation,) = violations(guard, [3.0] * 50 + [math.nan] + [3.0] * 50)
    assert violation.step == 51 and guard.state()["losses"] == [3.0] * 100


def test_gradient_norms_have_a_fixed_limit_a_relative_one_or_both() -> None:
    norms = [1.0 + 0.1 * (step % 7) for step in range(100)]
    norms[50], norms[60] = 5.0, 200.0
    by_max = violations(
        guards(spike=None, grad_norm={"max": 4.0, "action": "stop"}), [3.0] * 100, norms
    )
    assert [(violation.step, violation.action, violation.guard) for violation in by_max] == [
        (51, "stop", "grad_norm"),
        (61, "stop", "grad_norm"),
    ]
    by_deviations = violations(
        guards(spike=None, grad_norm={"deviations": 15.0}), [3.0] * 100, norms
    )
    assert [violation.step for violation in by_deviations] == [
        61
    ] and "times the median" in by_deviations[0].reason
    assert (
        len(
            violations(
                guards(spike=None, grad_norm={"max": 100.0, "deviations": 3.0}), [3.0] * 100, norms
            )
        )
        == 2
    )
    with pytest.raises(ValueError, match="set max, deviations, or both"):
        guards(grad_norm={})


def test_the_severest_action_is_taken() -> None:
    found = [Violation("spike", action, 3, "") for action in ("skip", "stop", "warn", "rollback")]
    assert (
        severest(found) == found[1]
        and severest(found[:1] + found[2:]) == found[3]
        and severest([]) is None
    )


def test_only_guards_that_may_refuse_have_to_be_asked_before_an_update() -> None:
    assert (
        not guards().may_skip
        and not guards(spike=None).may_skip
        and not guards(grad_norm={"max": 1.0}).may_skip
    )
    assert (
        guards(spike={"action": "skip"}).may_skip
        and guards(spike=None, grad_norm={"max": 1.0, "action": "stop"}).may_skip
    )


def test_a_resumed_guard_decides_as_the_one_that_went_on() -> None:
    losses = clean_losses(300, seed=5)
    losses[150] = losses[151] = losses[152] = 20.0
    config = {"spike": {"action": "rollback", "in_a_row": 3}, "grad_norm": {"max": 10.0}}
    for at in (20, 100, 151, 152, 200):
        whole, first, second = guards(**config), guards(**config), guards(**config)
        expected = violations(whole, losses)
        found = violations(first, losses[:at])
        second.restore(json.loads(json.dumps(first.state())))
        found += [
            violation
            for step, loss in enumerate(losses[at:], at + 1)
            for violation in second.look(step, loss, 1.0)
        ]
        assert found == expected and second.state() == whole.state()
    forgetful = guards(**config)
    assert [
        violation
        for step, loss in enumerate(losses[151:], 152)
        for violation in forgetful.look(step, loss, 1.0)
    ] == []


def test_a_checkpoint_without_guards_is_taken_up() -> None:
    guard = guards()
    guard.restore({})
    assert violations(guard, [3.0] * 20) == []


def test_validation_far_above_training_is_told() -> None:
    violation = guards(validation_gap={"nats": 0.5, "action": "stop"}).validation_gap(7, 3.6, 3.0)
    assert (
        violation is not None
        and (violation.action, violation.step) == ("stop", 7)
        and "3.6000 is more than 0.5 above the training loss 3.0000" in violation.reason
    )
    assert guards(validation_gap={"nats": 0.7}).validation_gap(7, 3.6, 3.0) is None
    assert (
        guards(validation_gap=None).validation_gap(7, 9.0, 3.0) is None
        and guards().validation_gap(7, 9.0, None) is None
    )


def test_few_outliers_do_not_move_what_a_window_compares_with() -> None:
    window = RobustWindow(64)
    assert window.rise(1.0) is None
    for number in range(64):
        window.add(100.0 if number % 3 == 0 else 1.0 + 0.01 * (number % 5))
    rise = window.rise(2.0)
    assert rise is not None and rise[0] == pytest.approx(0.97) and rise[1] > 20
