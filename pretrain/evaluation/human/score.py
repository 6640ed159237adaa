"""What raters' sheets say: win rates or means, with intervals, and how far raters agree.

Ratings of one item are not independent, so that intervals come from a bootstrap over items (Efron &
Tibshirani 1993, chapter 8: the items are the units that were drawn).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from pretrain.evaluation.human.agreement import Level, krippendorff_alpha
from pretrain.evaluation.human.sheets import Judgement, read_sheets
from pretrain.evaluation.human.study import PAIRS, SIDES, TIE, Key, read_key

RESAMPLES = 10_000
ALPHA_RESAMPLES = 2_000
CONFIDENCE = 0.95
MEMORY_ELEMENTS = 5_000_000
Interval = list[float]


class Agreement(TypedDict):
    """Krippendorff's alpha; None if nothing can be said. ``units`` have two ratings or more."""

    alpha: float | None
    interval: Interval | None
    level: Level
    units: int


class RaterSummary(TypedDict):
    """One rater: how much was rated, and what would show a habit.

    Attributes:
        score: of pairs the share of the first model (a tie is half), of ratings the mean.
        left_share: of a pair's decided judgements, those for the left side.
    """

    judgements: int
    score: float
    left_share: float | None


class PairResult(TypedDict):
    """The first model against the second.

    Attributes:
        wins, losses, ties: judgements.
        win_rate: share of judgements for the first model, a tie half.
        majority: items by what most of their raters said, and a two-sided sign test of the decided
            ones with the Wilson interval of the first model's share.
        left_share: of decided judgements, with its Wilson interval: far from a half, raters chose
            by place.
    """

    wins: int
    losses: int
    ties: int
    win_rate: float
    win_rate_interval: Interval
    majority: dict[str, object]
    left_share: float | None
    left_interval: Interval | None
    agreement: Agreement


class CriterionResult(TypedDict):
    """Ratings by one criterion; ``counts`` by value."""

    ratings: int
    mean: float
    interval: Interval
    counts: dict[str, int]
    agreement: Agreement


class HumanResult(TypedDict, total=False):
    """The score of a study, as ``--json`` writes it; ``pairs`` or ``criteria`` by its kind."""

    study: str
    mode: str
    question: str
    models: list[dict[str, object]]
    items: int
    identical: int
    rated_items: int
    judgements: int
    unrated: int
    comments: int
    confidence: float
    raters: dict[str, RaterSummary]
    pairs: PairResult
    criteria: dict[str, CriterionResult]


def score_study(paths: Sequence[Path], key_path: Path) -> HumanResult:
    """The score of filled-in sheets.

    Raises:
        DataError: if a sheet or the key is damaged, or they do not belong together.
    """
    key, study = read_key(key_path)
    sheets = read_sheets(paths, key, study)
    judgements = sheets.judgements
    result: HumanResult = {
        "study": study,
        "mode": key.mode,
        "question": key.question,
        "models": [model.model_dump() for model in key.models],
        "items": len(key.items),
        "identical": key.identical,
        "rated_items": len({one.item for one in judgements}),
        "judgements": len(judgements),
        "unrated": sheets.unrated,
        "comments": sheets.comments,
        "confidence": CONFIDENCE,
        "raters": _raters(judgements),
    }
    if key.mode == PAIRS:
        result["pairs"] = _pairs(judgements, key.seed)
    else:
        result["criteria"] = _criteria(judgements, key)
    return result


def _raters(judgements: Sequence[Judgement]) -> dict[str, RaterSummary]:
    by_rater: defaultdict[str, list[Judgement]] = defaultdict(list)
    names: dict[str, str] = {}
    for one in judgements:
        # As in the check for double ratings: case is no difference between two persons.
        by_rater[names.setdefault(one.rater.casefold(), one.rater)].append(one)
    return {
        rater: {
            "judgements": len(mine),
            "score": float(np.mean([score for one in mine for score in _scores(one)])),
            "left_share": _left_share(mine)[0],
        }
        for rater, mine in sorted(by_rater.items())
    }


def _scores(one: Judgement) -> list[float]:
    """1 for the first model, 0 for the second, a half for a tie; or all ratings."""
    if one.choice is None:
        return [float(value) for value in one.ratings.values()]
    return [0.5 if one.preferred is None else 1.0 - one.preferred]


def _by_item(pairs: Sequence[tuple[str, float]]) -> list[list[float]]:
    """The values of each item."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for item, value in pairs:
        found[item].append(value)
    return list(found.values())


def _pairs(judgements: Sequence[Judgement], seed: int) -> PairResult:
    units = _by_item([(one.item, _scores(one)[0]) for one in judgements])
    scores = [score for unit in units for score in unit]
    left_share, left_interval = _left_share(judgements)
    return {
        "wins": scores.count(1.0),
        "losses": scores.count(0.0),
        "ties": scores.count(0.5),
        "win_rate": float(np.mean(scores)),
        "win_rate_interval": mean_interval(units, seed),
        "majority": _majority(units),
        "left_share": left_share,
        "left_interval": left_interval,
        # A tie is a third category, not a value between the two models.
        "agreement": agreement(units, "nominal", seed),
    }


def _majority(units: Sequence[Sequence[float]]) -> dict[str, object]:
    wins = losses = 0
    for unit in units:
        ahead = unit.count(1.0) - unit.count(0.0)
        wins += ahead > 0
        losses += ahead < 0
    share, interval = wilson(wins, wins + losses)
    return {
        "wins": wins,
        "losses": losses,
        "undecided": len(units) - wins - losses,
        "share": share,
        "interval": interval,
        "p_value": sign_test(wins, wins + losses),
    }


def _left_share(judgements: Sequence[Judgement]) -> tuple[float | None, Interval | None]:
    decided = [one.choice for one in judgements if one.choice not in (None, TIE)]
    return wilson(decided.count(SIDES[0]), len(decided))


def _criteria(judgements: Sequence[Judgement], key: Key) -> dict[str, CriterionResult]:
    found: dict[str, CriterionResult] = {}
    for name in key.criteria:
        units = _by_item(
            [(one.item, float(one.ratings[name])) for one in judgements if name in one.ratings]
        )
        values = [value for unit in units for value in unit]
        if not values:
            continue
        found[name] = {
            "ratings": len(values),
            "mean": float(np.mean(values)),
            "interval": mean_interval(units, key.seed),
            "counts": {str(int(value)): values.count(value) for value in sorted(set(values))},
            "agreement": agreement(units, "ordinal", key.seed),
        }
    return found


def wilson(count: int, total: int) -> tuple[float | None, Interval | None]:
    """A share and its interval (Wilson 1927); None for a share of nothing."""
    if not total:
        return None, None
    from scipy.stats import binomtest  # imported only where humans are scored

    interval = binomtest(count, total).proportion_ci(CONFIDENCE, method="wilson")
    return count / total, [float(interval.low), float(interval.high)]


def sign_test(count: int, total: int) -> float | None:
    """Two-sided p-value of as uneven a share, if both were equally likely; None for nothing."""
    if not total:
        return None
    from scipy.stats import binomtest

    return float(binomtest(count, total).pvalue)


def mean_interval(units: Sequence[Sequence[float]], seed: int) -> Interval:
    """The interval of the mean over all values of units, of which whole ones are drawn again.

    With few units it is too narrow: one alone has no width.
    """
    sums_U = np.array([sum(unit) for unit in units])
    counts_U = np.array([len(unit) for unit in units])
    source = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    # In parts, so that thousands of items need no gigabytes.
    part = max(1, MEMORY_ELEMENTS // len(units))
    for first in range(0, RESAMPLES, part):
        drawn_RU = source.integers(0, len(units), size=(min(part, RESAMPLES - first), len(units)))
        means.append(sums_U[drawn_RU].sum(axis=1) / counts_U[drawn_RU].sum(axis=1))
    return _middle(np.concatenate(means))


def agreement(units: Sequence[Sequence[float]], level: Level, seed: int) -> Agreement:
    """Krippendorff's alpha, with an interval over items."""
    pairable = [unit for unit in units if len(unit) > 1]
    alpha = krippendorff_alpha(pairable, level)
    interval: Interval | None = None
    if alpha is not None:
        source = np.random.default_rng(seed)
        drawn = (
            krippendorff_alpha([pairable[number] for number in numbers], level)
            for numbers in source.integers(
                0, len(pairable), size=(_alpha_resamples(len(pairable)), len(pairable))
            )
        )
        interval = _middle(np.array([value for value in drawn if value is not None]))
    return {"alpha": alpha, "interval": interval, "level": level, "units": len(pairable)}


def _alpha_resamples(units: int) -> int:
    # Each one is a loop over all units in Python: some seconds at most.
    return max(200, min(ALPHA_RESAMPLES, 200_000 // units))


def _middle(values: np.ndarray) -> Interval:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return [float(low), float(high)]
