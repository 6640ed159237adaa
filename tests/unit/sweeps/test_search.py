"""Points that optuna chooses: from the axes, the same after an interruption, and better ones with
time.
"""

from __future__ import annotations

import math

import pytest

from pretrain.sweeps.axes import Point, parse_axis
from pretrain.sweeps.search import next_point, random_points, should_prune
from pretrain.sweeps.study import Record

RATE, EXPERTS = "optimizer.learning_rate", "experts"
AXES = [
    parse_axis(RATE, "log:1e-5:1e-1"),
    parse_axis(
        EXPERTS, {"few": {"model.moe.num_experts": 4}, "many": {"model.moe.num_experts": 8}}
    ),
]
BEST = 3e-3


def loss_of(point: Point) -> float:
    return math.log10(point.numbers[RATE] / BEST) ** 2 + (
        0.5 if point.values[EXPERTS] == "few" else 0.0
    )


def finished(
    point: Point, loss: float | None = None, validation: tuple[tuple[int, float], ...] = ()
) -> Record:
    return Record(
        point,
        "finished",
        [{"exit_code": 0}],
        None,
        {"validation_loss_in_training": loss_of(point) if loss is None else loss},
        list(validation),
    )


def search(trials: int, seed: int) -> list[Record]:
    records: list[Record] = []
    for _ in range(trials):
        records.append(finished(next_point(AXES, records, seed)))
    return records


def test_random_points_lie_in_the_axes_and_follow_the_seed() -> None:
    points = random_points(AXES, 40, seed=1)
    numbers = [point.numbers[RATE] for point in points]
    assert all(1e-5 <= number <= 1e-1 for number in numbers) and {
        point.values[EXPERTS] for point in points
    } == {"few", "many"}
    assert (
        10 <= sum(number < 1e-3 for number in numbers) <= 30
    )  # by the logarithm: below the middle is about half
    assert points == random_points(AXES, 40, seed=1) != random_points(AXES, 40, seed=2)
    assert (
        points[0].name == "trial_0000"
        and points[0].overrides[0] == f"{RATE}={points[0].values[RATE]}"
    )


def test_a_search_finds_better_points_than_chance() -> None:
    for seed in (0, 1):
        chosen = [loss_of(record.point) for record in search(25, seed)][15:]
        drawn = [loss_of(point) for point in random_points(AXES, 25, seed)][15:]
        assert sum(chosen) < 0.5 * sum(drawn), seed


def test_an_interrupted_search_chooses_what_it_would_have_chosen() -> None:
    whole = [record.point for record in search(14, seed=5)]
    records = [finished(point) for point in whole[:13]]  # as read back from disk
    assert next_point(AXES, records, 5) == whole[13]
    assert (
        next_point(AXES, [finished(point, loss=-loss_of(point)) for point in whole[:13]], 5)
        != whole[13]
    )


def test_a_diverged_run_is_bad_news_and_a_failed_one_is_no_news() -> None:
    records = search(12, seed=0)
    for record in records[6:]:
        record.state, record.result, record.attempts = "failed", None, [{"exit_code": 6}]
    diverged = next_point(AXES, records, 0)
    for record in records[6:]:
        record.attempts = [{"exit_code": 3}]
    assert next_point(AXES, records, 0) != diverged


def test_integers_stay_integers() -> None:
    axes = [parse_axis("model.moe.top_k", "int:1:4")]
    points = random_points(axes, 20, seed=0)
    assert {point.overrides[0] for point in points} == {
        f"model.moe.top_k={k}" for k in (1, 2, 3, 4)
    }
    assert next_point(axes, [finished(points[0], loss=1.0)], 0).overrides[0].split("=")[1] in "1234"


@pytest.mark.parametrize(
    "losses,pruned",
    [
        (((1, 9.0), (2, 8.0)), True),
        (((1, 9.0), (2, 2.0)), False),
        (((1, 9.0),), False),
        ((), False),
    ],
)
def test_a_run_worse_than_the_median_is_pruned_after_its_second_validation(
    losses: tuple[tuple[int, float], ...], pruned: bool
) -> None:
    records = [
        finished(point, 1.0, ((1, 5.0 + rank), (2, 4.0 + rank)))
        for rank, point in enumerate(random_points(AXES, 4, 0))
    ]
    assert should_prune(records, losses) is pruned
    assert not should_prune(records[:3], losses)  # too few to know
