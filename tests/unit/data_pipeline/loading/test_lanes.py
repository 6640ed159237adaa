"""Lanes: every unit in exactly one of them, and every sample on a rank that reads its lane."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from data_pipeline.loading.lanes import (
    MOST_LANES,
    choose_lanes,
    choose_parts,
    lanes_of_rank,
    positions,
    units_of_lane,
)


@pytest.mark.parametrize("num_units", [1, 2, 3, 7, 16, 54, 61])
@pytest.mark.parametrize("seed", [None, "7 a"])
def test_each_epoch_has_every_unit_once_in_one_lane_and_lanes_stay_even(
    num_units: int, seed: str | None
) -> None:
    for lanes in (1, 2, 3, 8):
        totals: Counter[int] = Counter()
        orders = []
        for epoch in range(2 * lanes):
            parts = [units_of_lane(num_units, lane, lanes, epoch, seed) for lane in range(lanes)]
            dealt = [unit for part in parts for unit in part]
            assert sorted(dealt) == list(range(num_units))
            totals.update({lane: len(part) for lane, part in enumerate(parts)})
            orders.append(dealt)
        # Over as many epochs as lanes each lane has had the longer part equally often.
        assert set(totals.values()) == {2 * num_units}
        if seed is not None and num_units > 6:
            assert orders[0] != orders[lanes]
            assert orders[0] != units_of_lane(num_units, 0, lanes, 0, "8 a")


@pytest.mark.parametrize("num_units,batch,expected", [
    (1, 512, 1), (3, 8, 1), (3, 6, 3), (4, 8, 4), (7, 8, 1), (8, 8, 8), (54, 128, 8),
    (1024, 512, MOST_LANES), (1024, 64, MOST_LANES), (1024, 30, 30), (1024, 7, 7), (5, 1, 1),
])  # fmt: skip
def test_lanes_divide_the_batch_and_have_about_as_many_units_each(
    num_units: int, batch: int, expected: int
) -> None:
    lanes = choose_lanes(num_units, batch)
    assert lanes == expected and batch % lanes == 0 and choose_parts(num_units, lanes) == 1


def test_units_are_cut_where_there_are_too_few_for_the_lanes() -> None:
    for num_units, lanes in product(range(1, 40), (1, 2, 4, 8, 32)):
        parts = choose_parts(num_units, lanes)
        sizes = [
            len(units_of_lane(num_units * parts, lane, lanes, 0, None)) for lane in range(lanes)
        ]
        assert min(sizes) >= 1 and max(sizes) <= min(sizes) * 1.25
    assert choose_parts(1, 8) == 8 and choose_parts(8, 8) == 1 and choose_parts(100, 8) == 1


@pytest.mark.parametrize("batch,micro", [(8, 1), (8, 2), (8, 4), (30, 5), (128, 8), (512, 16)])
def test_a_rank_reads_the_lane_of_each_of_its_samples_and_no_other_where_ranks_divide_lanes(
    batch: int, micro: int
) -> None:
    for lanes in (lanes for lanes in range(1, 33) if batch % lanes == 0):
        found = list(positions(batch, micro, lanes))
        # Each lane gives the same number of samples, whatever the micro batch.
        assert set(Counter(lane for _, lane in found).values()) == {batch // lanes}
        assert [number for number, _ in found] == [row // micro for row in range(batch)]
        for ranks in (ranks for ranks in range(1, 17) if batch % (micro * ranks) == 0):
            read = [lanes_of_rank(lanes, rank, ranks) for rank in range(ranks)]
            assert all(lane in read[number % ranks] for number, lane in found)
            readers = Counter(lane for own in read for lane in own)
            assert lanes % ranks or set(readers.values()) == {1}
            assert sum(readers.values()) < lanes * ranks or ranks == 1 or lanes % 2 or ranks % 2
