"""The indices of Megatron's BlendedDataset: which data set each sample of a blend is from.

Each sample is from the data set that is furthest behind its share: the largest
``weight * max(i, 1) - samples so far``, in double precision, the first one of equals. That is
sequential; here many parts are computed at the same time, each from a guess of how many samples it
begins with. A part whose guess was wrong is computed again from the end of the one before it, until
all fit, so the result is exact. After a wrong guess the sequence is the right one again after some
samples, so two or three rounds suffice.

Follows ``build_blending_indices`` of ``helpers.cpp`` and the sizes in
``blended_megatron_dataset_builder.py`` of megatron-core 0.16.1, on machines whose compiler rounds
each product (x86-64); one that fuses products and sums may break ties otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.loading.megatron.index import Advance

# Of a part: longer ones need fewer rounds, shorter ones fewer steps in Python.
PART_SAMPLES = 1024
SHORTEST_PART = 64
PARTS_AT_ONCE = 4096
MOST_DATA_SETS = 32766


@dataclass(frozen=True)
class BlendIndices:
    """The two indices of a BlendedDataset, memory-mapped or in memory.

    Attributes:
        sources: int16 [samples], the number of each sample's data set.
        samples: int64 [samples], the sample's number in it.
    """

    sources: np.ndarray
    samples: np.ndarray

    def __len__(self) -> int:
        return len(self.sources)


def normalized(weights: Sequence[float]) -> list[float]:
    """Return the weights divided by their sum, rounded as Megatron does."""
    values = np.array(weights, dtype=np.float64)
    shares: list[float] = (values / np.sum(values)).tolist()
    return shares


def sizes_of_blend(
    weights: Sequence[float], num_samples: int, surplus: float
) -> tuple[list[int], list[int]]:
    """Return the samples of each data set that a blend uses, and those that are made of it.

    Args:
        weights: normalized.
        surplus: Megatron's ``mid_level_dataset_surplus``.
    """
    used = [math.ceil(num_samples * weight) for weight in weights]
    return used, [math.ceil(count * (1 + surplus)) for count in used]


def build_blend(
    weights: Sequence[float], size: int, advance: Advance = lambda count: None
) -> BlendIndices:
    """Return the indices that Megatron builds for a blend of ``size`` samples.

    Args:
        weights: of each data set, above 0; they are normalized here, as Megatron does.
    """
    shares = np.array(normalized(weights), dtype=np.float64)
    sources = np.empty(size, dtype=np.int16)
    counts = np.zeros(len(shares), dtype=np.int64)
    group = PART_SAMPLES * PARTS_AT_ONCE
    for first in range(0, size, group):
        part = sources[first : first + group]
        counts = _fill(part, shares, first, counts)
        advance(len(part))
    # Running numbers within each data set. Stable: samples keep their order.
    order = np.argsort(sources, kind="stable")
    totals = np.bincount(sources, minlength=len(shares))
    begins = np.repeat(np.cumsum(totals) - totals, totals)
    samples = np.empty(size, dtype=np.int64)
    samples[order] = np.arange(size) - begins
    return BlendIndices(sources, samples)


def _fill(part: np.ndarray, shares: np.ndarray, first: int, counts: np.ndarray) -> np.ndarray:
    """Fill samples first .. of the blend, and return each data set's samples after them.

    Args:
        part: int16, is written.
        counts: int64, samples of each data set before them.
    """
    steps = min(max(math.isqrt(len(part)), SHORTEST_PART), PART_SAMPLES)
    number = -(-len(part) // steps)
    starts = first + np.arange(number) * steps
    # The last part may be shorter, and is computed in full.
    found = np.empty((number, steps), dtype=np.int16)
    begins = _likely_counts(shares, starts)
    begins[:, 0] = counts
    ends = np.empty_like(begins)
    wrong = np.arange(number)
    while len(wrong):
        found[wrong], ends[:, wrong] = _simulate(shares, starts[wrong], begins[:, wrong], steps)
        wrong = np.flatnonzero((ends[:, :-1] != begins[:, 1:]).any(axis=0)) + 1
        begins[:, wrong] = ends[:, wrong - 1]
    part[:] = found.ravel()[: len(part)]
    return np.asarray(counts + np.bincount(part, minlength=len(shares)))


def _likely_counts(shares: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the largest-remainder apportionment before each start: int64 [data sets, starts]."""
    wanted = shares[:, None] * starts
    counts = np.floor(wanted).astype(np.int64)
    missing = starts - counts.sum(axis=0)
    ranks = np.argsort(np.argsort(counts - wanted, axis=0, kind="stable"), axis=0, kind="stable")
    return np.asarray(counts + (ranks < missing))


def _simulate(
    shares: np.ndarray, starts: np.ndarray, begins: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Run the parts that begin at ``starts``, one sample of each at a time.

    Returns:
        int16 [parts, steps], and the counts after them: int64 [data sets, parts].
    """
    counts = begins.astype(np.float64)
    chosen = np.empty((steps, len(starts)), dtype=np.int16)
    parts = np.arange(len(starts))
    for step in range(steps):
        places = np.maximum(starts + step, 1).astype(np.float64)
        behind = shares[:, None] * places - counts
        most = behind.max(axis=0)
        # Backwards, so that the first of equals stays: argmax over a short axis is far slower.
        for source in range(len(shares) - 1, -1, -1):
            np.copyto(chosen[step], source, where=behind[source] == most)
        counts[chosen[step], parts] += 1
    return chosen.T, counts.astype(np.int64)
