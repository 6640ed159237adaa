"""How streamed sources are cut into lanes, so that ranks share the reading.

A lane is a stream of its own: a part of each source's units, with a position of its own. Lanes are
a function of the data and the global batch, not of the ranks. So any number of ranks sees the same
batches, and a run that resumes on other ranks takes over every position.

A step of G samples takes G / L from each of the L lanes. Of G / M micro batches, number j goes to
rank j % R, and its row i comes from lane (i * G / M + j) % L. R divides G / M, so a sample's lane
and its rank agree modulo gcd(L, R): a rank needs the lanes with its own remainder, and where R
divides L, no other rank needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import NamedTuple

import numpy as np

from data_pipeline.loading.shuffle import permute
from pretrain.core.seeds import derived_seed

# Each lane of a rank holds open files and a few megabytes.
MOST_LANES = 32
# With so many units to a lane, lanes that have one more than others hardly differ.
EVEN_ENOUGH = 4


class Position(NamedTuple):
    """A sample's place in a step: its micro batch, from 0, and its lane."""

    micro_batch: int
    lane: int


def choose_lanes(num_units: int, global_batch_size: int) -> int:
    """The number of lanes for a source of ``num_units``: it divides the global batch."""
    return max(
        lanes
        for lanes in range(1, min(MOST_LANES, num_units, global_batch_size) + 1)
        if global_batch_size % lanes == 0 and _is_even(num_units, lanes)
    )


def choose_parts(num_units: int, lanes: int) -> int:
    """Parts that each unit is cut into, by the numbers of its records, to keep all lanes busy."""
    parts = 1
    while not _is_even(num_units * parts, lanes):
        parts += 1
    return parts


def _is_even(num_units: int, lanes: int) -> bool:
    return num_units % lanes == 0 or num_units >= EVEN_ENOUGH * lanes


def lanes_of_rank(lanes: int, rank: int, ranks: int) -> list[int]:
    """The lanes that hold a rank's samples."""
    common = gcd(lanes, ranks)
    return [lane for lane in range(lanes) if lane % common == rank % common]


def positions(global_batch_size: int, micro_batch_size: int, lanes: int) -> Iterator[Position]:
    """Yield micro batch and lane of each sample of a step, in the batch's order."""
    micro_batches = global_batch_size // micro_batch_size
    for micro_batch in range(micro_batches):
        for row in range(micro_batch_size):
            yield Position(micro_batch, (row * micro_batches + micro_batch) % lanes)


def units_of_lane(num_units: int, lane: int, lanes: int, epoch: int, seed: str | None) -> list[int]:
    """The units of a lane in an epoch, in their order: each unit is in exactly one lane.

    Over epochs all lanes have one unit more than others equally often.

    Args:
        seed: of the epoch's order; None keeps the order of the units.
    """
    order = np.arange(num_units)
    if seed is not None:
        order = permute(order, num_units, derived_seed(seed), epoch)
    units: list[int] = order[(lane + epoch) % lanes :: lanes].tolist()
    return units
