"""Rows of choices in which every allowed pair of values stands at least once (pairwise testing)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from allpairspy import AllPairs

# A parameter and one of its values.
Choice = tuple[str, str]
Row = tuple[Choice, ...]
# Every parameter with its values; the first one is laid under whatever is not chosen.
Values = Mapping[str, Sequence[str]]


def pairs_of(row: Row) -> set[Row]:
    """Every pair of a row's choices."""
    return set(itertools.combinations(row, 2))


def ordered(values: Values, choices: Iterable[Choice]) -> Row:
    """The choices in the order of the parameters."""
    return tuple(sorted(choices, key=lambda choice: list(values).index(choice[0])))


def covering_rows(
    values: Values, allowed: frozenset[Row], refusal: Callable[[Row], str | None]
) -> tuple[Row, ...]:
    """Rows that hold every allowed pair, and no other.

    The search, largest parameters first, ends at its first row without a new pair and leaves a few
    out: as many of these as go together are laid over the parameters' first values.

    Args:
        refusal: why the rules refuse a row; None if they do not.
    """

    def fits(prefix: list[Choice]) -> bool:
        """Whether the last choice goes with all before it; the rules see a whole row as well."""
        last = prefix[-1]
        if any(
            (choice, last) not in allowed and (last, choice) not in allowed
            for choice in prefix[:-1]
        ):
            return False
        return len(prefix) < len(values) or refusal(ordered(values, prefix)) is None

    own = {name: choices[0] for name, choices in values.items()}
    names = sorted(values, key=lambda name: -len(values[name]))
    choices = [[(name, value) for value in values[name]] for name in names]
    found = [ordered(values, row) for row in AllPairs(choices, filter_func=fits)]
    missing = sorted(allowed - set().union(*map(pairs_of, found)))
    while missing:
        laid: dict[str, str] = {}
        for pair in missing:
            row = ordered(values, (own | laid | dict(pair)).items())
            if (
                all(laid.get(name, value) == value for name, value in pair)
                and pairs_of(row) <= allowed
                and refusal(row) is None
            ):
                laid |= dict(pair)
        assert laid, missing
        found.append(ordered(values, (own | laid).items()))
        missing = [pair for pair in missing if pair not in pairs_of(found[-1])]
    return tuple(found)


def spanning_rows(values: Values, rows: Sequence[Row]) -> tuple[Row, ...]:
    """The fewest rows found that have every value that any row has.

    Each has the most values of no earlier one, then the most new pairs.
    """
    chosen: list[Row] = []
    missing = {choice for row in rows for choice in row}
    pairs: set[Row] = set()
    while missing:
        best = max(
            (row for row in rows if row not in chosen),
            key=lambda row: (len(missing & {*row}), len(pairs_of(row) - pairs)),
        )
        chosen.append(best)
        missing -= set(best)
        pairs |= pairs_of(best)
    return tuple(chosen)
