"""How far raters agree: Krippendorff's alpha, from its definition.

The package ``krippendorff`` is under the GPL, and NLTK's version drops units with a missing rating.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

Level = Literal["nominal", "ordinal", "interval"]
# Squared distance of each pair of C values, [C, C], from the values and how often each occurs.
Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _nominal(values_C: np.ndarray, counts_C: np.ndarray) -> np.ndarray:
    return (values_C[:, None] != values_C[None, :]).astype(np.float64)


def _interval(values_C: np.ndarray, counts_C: np.ndarray) -> np.ndarray:
    squared: np.ndarray = (values_C[:, None] - values_C[None, :]) ** 2
    return squared


def _ordinal(values_C: np.ndarray, counts_C: np.ndarray) -> np.ndarray:
    # Ratings from one value up to the other, with half of those at both ends.
    below_C = np.cumsum(counts_C) - counts_C / 2
    squared: np.ndarray = (below_C[:, None] - below_C[None, :]) ** 2
    return squared


DISTANCES: dict[Level, Distance] = {
    "nominal": _nominal,
    "ordinal": _ordinal,
    "interval": _interval,
}


def krippendorff_alpha(units: Sequence[Sequence[float]], level: Level) -> float | None:
    """Alpha (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    1 is perfect agreement, 0 what chance gives. Units may have any number of ratings; those with
    one have nothing to agree on, and count nowhere.

    Args:
        units: the ratings of each unit, as numbers.

    Returns:
        None without two ratings of a unit, or if all ratings are equal: nothing then says whether
        raters could have disagreed.
    """
    pairable = [unit for unit in units if len(unit) > 1]
    values_C = np.unique([value for unit in pairable for value in unit]).astype(np.float64)
    if len(values_C) < 2:
        return None
    coincidences_CC = np.zeros((len(values_C), len(values_C)))
    for unit in pairable:
        counts_C = np.zeros(len(values_C))
        np.add.at(counts_C, np.searchsorted(values_C, np.asarray(unit, np.float64)), 1.0)
        # Ordered pairs of two ratings of the unit; a rating is no pair with itself.
        pairs_CC = np.outer(counts_C, counts_C) - np.diag(counts_C)
        coincidences_CC += pairs_CC / (len(unit) - 1)
    counts_C = coincidences_CC.sum(axis=1)
    distances_CC = DISTANCES[level](values_C, counts_C)
    observed = float((coincidences_CC * distances_CC).sum())
    expected = float((np.outer(counts_C, counts_C) * distances_CC).sum()) / (counts_C.sum() - 1)
    return 1.0 - observed / expected
