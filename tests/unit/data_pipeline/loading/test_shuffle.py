"""The order of samples: a permutation in each epoch, and a pure function."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.shuffle import permute, sample_indices, shuffled

SIZES = [
    *range(1, 40),
    63,
    64,
    65,
    97,
    101,
    127,
    255,
    256,
    257,
    1000,
    1021,
    4095,
    4096,
    4097,
    10_007,
    65_537,
]


@pytest.mark.parametrize("num_samples", SIZES)
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1234, 5)])
def test_each_epoch_is_a_bijection(num_samples: int, seed: int, epoch: int) -> None:
    permuted = permute(np.arange(num_samples), num_samples, seed, epoch)
    assert permuted.dtype == np.int64
    assert np.array_equal(np.sort(permuted), np.arange(num_samples))


def test_huge_sample_counts_need_no_memory_and_stay_inside() -> None:
    num_samples = 2**60 + 7
    permuted = permute(np.array([0, 1, num_samples - 1]), num_samples, 1, 0)
    assert len(set(permuted.tolist())) == 3
    assert permuted.min() >= 0 and permuted.max() < num_samples


def test_epochs_and_seeds_differ_and_nothing_else_matters() -> None:
    indices = np.arange(1000)
    first = permute(indices, 1000, seed=1, epoch=0)
    assert np.array_equal(first, permute(indices, 1000, seed=1, epoch=0))
    assert np.array_equal(first[17:400], permute(indices[17:400], 1000, seed=1, epoch=0))
    # Two independent permutations agree in one place on average.
    assert (first == permute(indices, 1000, seed=1, epoch=1)).sum() < 10
    assert (first == permute(indices, 1000, seed=2, epoch=0)).sum() < 10
    assert (first == indices).sum() < 10


@pytest.mark.parametrize("num_samples", [3, 4])
def test_small_permutations_are_equally_likely(num_samples: int) -> None:
    seeds = 4800
    counts = Counter(
        tuple(permute(np.arange(num_samples), num_samples, seed, 0).tolist())
        for seed in range(seeds)
    )
    kinds = 6 if num_samples == 3 else 24
    expected = seeds / kinds
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == kinds
    assert chi_squared < kinds + 5 * (2 * kinds) ** 0.5


def test_a_sample_lands_anywhere_with_equal_chance() -> None:
    num_samples, epochs = 50, 2000
    places = np.stack(
        [permute(np.arange(num_samples), num_samples, 7, epoch) for epoch in range(epochs)]
    )
    counts = np.stack(
        [np.bincount(places[:, sample], minlength=num_samples) for sample in range(num_samples)]
    )
    expected = epochs / num_samples
    degrees = (num_samples - 1) ** 2
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - degrees) < 6 * (2 * degrees) ** 0.5


def test_neighbours_do_not_stay_neighbours() -> None:
    num_samples = 4099
    steps = np.diff(permute(np.arange(num_samples), num_samples, 3, 0)) % num_samples
    assert np.bincount(steps, minlength=num_samples).max() < 12


@pytest.mark.parametrize(
    ("first", "count", "num_samples"), [(0, 12, 4), (3, 1, 4), (5, 9, 7), (10, 3, 1), (0, 0, 5)]
)
def test_sample_indices_run_through_consecutive_epochs(
    first: int, count: int, num_samples: int
) -> None:
    epochs = first // num_samples, (first + count) // num_samples
    whole = np.concatenate(
        [permute(np.arange(num_samples), num_samples, 9, epoch) for epoch in range(epochs[1] + 1)]
    )
    assert np.array_equal(
        sample_indices(first, count, num_samples, 9), whole[first : first + count]
    )


@pytest.mark.parametrize("index", [-1, 10])
def test_indices_outside_the_samples_are_refused(index: int) -> None:
    with pytest.raises(ValueError, match=r"\[0, 10\)"):
        permute(np.array([index]), 10, 0, 0)


@given(st.integers(1, 500), st.integers(0, 2**40), st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_every_epoch_shows_every_sample_once_and_epochs_and_seeds_differ(
    num_samples: int, seed: int, epoch: int
) -> None:
    positions = np.arange(epoch * num_samples, (epoch + 2) * num_samples)
    whole = shuffled(positions, num_samples, seed)
    first, second = whole[:num_samples], whole[num_samples:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(num_samples))
    picked = np.random.default_rng(0).permutation(len(positions))
    assert np.array_equal(shuffled(positions[picked], num_samples, seed), whole[picked])
    if num_samples >= 40:  # smaller ones may agree by chance
        assert not np.array_equal(first, second) and not np.array_equal(
            whole, shuffled(positions, num_samples, seed + 1)
        )
