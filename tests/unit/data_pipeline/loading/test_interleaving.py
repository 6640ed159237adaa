"""Shares of a mixture, against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading import interleaving as module
from data_pipeline.loading.interleaving import BLOCK, END, STRETCH, Interleaving, floors

LARGEST_START = 10**12


def furthest(
    shares: list[Fraction], interleaving: Interleaving, first: int, count: int
) -> Fraction:
    """How far any source is from its exact share after any of the slots; the running numbers are
    checked on the way.
    """
    total, before = sum(shares), interleaving.counts_before(first)
    owners, numbers = interleaving.slots(first, count)
    found = Fraction(0)
    for source, share in enumerate(shares):
        mine = owners == source
        counts = before[source] + np.cumsum(mine)
        assert (numbers[mine] == counts[mine] - 1).all()
        # |total * count - share * slot| in whole numbers, of slots that share no factor with
        # anything.
        ends = range(first + 1, first + count + 1)
        numerator, denominator = (share / total).numerator, (share / total).denominator
        worst = max(
            abs(denominator * taken - numerator * end)
            for taken, end in zip(counts.tolist(), ends, strict=True)
        )
        found = max(found, Fraction(worst, denominator))
    assert interleaving.counts_before(first + count) == [
        count_ + int((owners == source).sum()) for source, count_ in enumerate(before)
    ]
    return found


def decimals(*shares: str) -> list[Fraction]:
    return [Fraction(share) for share in shares]


HARD = {
    "two": decimals("0.7", "0.3"),
    "a rare one": decimals("1e-9", "0.999999999"),
    "one large and thirty small": decimals("0.7", *["0.01"] * 30),
    "scales": decimals(
        "1", "0.52", "0.27", "0.009", "0.004", "2e-4", "1e-4", "9e-5", "1e-8", "1e-12"
    ),
    "forty of every size": [Fraction(repr(0.61**k)) for k in range(40)],
    "irrational ones": [Fraction(n ** (1 / 3.7)) for n in (5, 77, 1234567, 89, 4)],
    "equal ones": [Fraction(1)] * 17,
    "none of one": decimals("0", "3", "0", "4"),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("first", [0, 10**8 - 700, LARGEST_START - 700])
def test_every_prefix_holds_each_share_to_within_one_slot(name: str, first: int) -> None:
    shares = HARD[name]
    assert furthest(shares, Interleaving(shares), first, 1400) < 1


@given(st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shares_are_held_at_any_place(data: st.DataObject) -> None:
    size = st.one_of(
        st.integers(1, 50).map(Fraction),
        st.floats(1e-9, 1).map(lambda share: Fraction(repr(share))),
        st.floats(-9, 0).map(lambda e: Fraction(10**e)),
    )
    shares = data.draw(st.lists(size, min_size=2, max_size=12))
    first = data.draw(st.integers(0, LARGEST_START))
    assert furthest(shares, Interleaving(shares), first, 300) < 1


# Weights and a prefix at which bisection to the nearest whole numbers, with the same earliest
# deadlines in between, was further away than a slot (by 1.03 to 1.17).
TIGHT = [
    (
        "864378736126470 115733828792444 16740312508603 2652995868779 445574618351 48552085355",
        567802,
    ),
    (
        "993503357846028 2648446261687 1866147925261 968482583808 915217382996 98348000222",
        206418881973,
    ),
    ("921911734861243 33778252264399 24734484285293 19451403987813 124124601255", 785424899),
    ("992882363949417 2632271582049 2242887111336 2228126984824 14342447176 7925201", 43535),
    ("998795683262209 522465784405 345184961285 329835292671 3720338937 3110360496", 1129839676),
]


@pytest.mark.parametrize(("weights", "place"), TIGHT)
def test_places_with_little_choice_are_within_one_slot_too(weights: str, place: int) -> None:
    shares = decimals(*weights.split())
    assert furthest(shares, Interleaving(shares), place - 700, 1400) < 1


def test_counts_decided_by_bisection_alone_are_within_one_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Down to single slots, so that no earliest deadline can make up for a bad choice."""
    monkeypatch.setattr(module, "STRETCH", 1)
    monkeypatch.setattr(module, "BLOCK", 64)
    for shares in (*HARD.values(), *(decimals(*weights.split()) for weights, _ in TIGHT)):
        for first in (0, LARGEST_START - 50):
            assert furthest(shares, Interleaving(shares), first, 150) < 1


def test_a_rule_that_looks_at_each_source_alone_would_fail_the_same_check() -> None:
    """Thirty small sources that are all due at the same places leave the large one behind: what
    sorting by (k + 0.5) / share gives.
    """
    shares = HARD["one large and thirty small"]
    keys = sorted(
        (Fraction(2 * k + 1, 2) / share, source)
        for source, share in enumerate(shares)
        for k in range(int(100 * share))
    )
    counts, worst = [0] * len(shares), Fraction(0)
    for end, (_, owner) in enumerate(keys, start=1):
        counts[owner] += 1
        worst = max(
            worst, *(abs(count - share * end) for count, share in zip(counts, shares, strict=True))
        )
    assert worst > 5


def test_whole_numbers_are_met_exactly_at_the_end_of_each_period() -> None:
    counts = [4000, 413, 7, 0, 1]
    interleaving = Interleaving(counts)
    for periods in (1, 2, 3, 10**6):
        assert interleaving.counts_before(periods * sum(counts)) == [
            periods * count for count in counts
        ]
    owners, numbers = interleaving.slots(0, 2 * sum(counts))
    for source, count in enumerate(counts):
        assert numbers[owners == source].tolist() == list(range(2 * count))


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    st.integers(0, 2 * BLOCK),
    st.integers(1, 400),
)
@settings(max_examples=25, deadline=None)
def test_a_slot_is_found_by_its_number_and_ranges_agree(
    counts: list[int], first: int, count: int
) -> None:
    interleaving = Interleaving(counts)
    owners, numbers = interleaving.slots(first, count)
    for place in (0, count // 2, count - 1):
        assert interleaving.slot_of(int(owners[place]), int(numbers[place])) == first + place
    again = Interleaving(counts).slots(first + count // 2, count - count // 2)
    assert (
        again[0].tolist() == owners[count // 2 :].tolist()
        and again[1].tolist() == numbers[count // 2 :].tolist()
    )


def test_what_comes_too_late_is_never_found() -> None:
    interleaving = Interleaving(decimals("1e-30", "1"))
    assert interleaving.slot_of(0, 0) is None
    assert interleaving.slot_of(1, 10**17) == 10**17
    assert END > 10**18 > 10**12 and BLOCK % STRETCH == 0


@given(st.integers(1, 10**30), st.integers(0, 10**30), st.integers(0, 10**15))
@settings(max_examples=60, deadline=None)
def test_floors_are_those_of_exact_fractions(denominator: int, numerator: int, first: int) -> None:
    fraction = Fraction(min(numerator, denominator), denominator)
    whole, has_rest = floors(fraction, first, 300)
    exact = [
        divmod(fraction.numerator * n, fraction.denominator) for n in range(first, first + 300)
    ]
    assert whole.tolist() == [quotient for quotient, _ in exact]
    assert has_rest.tolist() == [rest > 0 for _, rest in exact]


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_floors_are_exact_next_to_whole_numbers(offset: int) -> None:
    """Shares within 10^-25 of a half: every second product is all but a whole number."""
    test_floors_are_those_of_exact_fractions.hypothesis.inner_test(
        2 * 10**25, 10**25 + offset, 10**12
    )


@pytest.mark.full
def test_hostile_shares_are_held_over_many_places() -> None:
    """Random shares over many scales, 2 to 40 sources."""
    random = np.random.default_rng(0)
    beyond = prefixes = 0
    worst = Fraction(0)
    for _ in range(150):
        count = int(random.integers(2, 41))
        scales = 10.0 ** -random.uniform(0, 9, size=int(random.integers(1, 6)))
        shares = [
            Fraction(repr(float(random.choice(scales) * random.uniform(0.5, 1))))
            for _ in range(count)
        ]
        first = int(10 ** random.uniform(0, 12))
        found = furthest(shares, Interleaving(shares), first, 2000)
        prefixes, beyond, worst = prefixes + 2000, beyond + (found >= 1), max(worst, found)
    assert beyond == 0, f"{beyond} of 150 ranges, by up to {float(worst)}"
