"""Which source each sample comes from: shares, epochs, limits, and a mixture that changes in the
middle of a run.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import Mixture, Proportional, Temperature, TokenBudget, Weights
from data_pipeline.loading.mixture import MixtureEntry, MixtureSchedule, SourceState, check_names
from data_pipeline.loading.packing import Windows
from data_pipeline.loading.plan import LoaderPhase
from data_pipeline.loading.shard_loader import ShardLoader, TrainingSource
from data_pipeline.loading.shuffle import sample_indices
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.token_stream import open_split
from pretrain.core.errors import CheckpointError, ConfigError, DataError
from tests.support.data_folder import counting_stream
from tests.support.json_damage import damaged

S = 4
Sizes = dict[str, int]


def weights(values: dict[str, float], max_epochs: dict[str, float] | None = None) -> Weights:
    return Weights(kind="weights", weights=values, max_epochs=max_epochs or {})


def schedule_of(mixture: Mixture, sizes: Sizes) -> MixtureSchedule:
    return MixtureSchedule(
        [
            MixtureEntry(
                0, mixture, {name: SourceState(name, size) for name, size in sizes.items()}, S
            )
        ]
    )


def taken_in(schedule: MixtureSchedule, first: int, count: int) -> list[tuple[str, int]]:
    """Source and running number of each sample."""
    found: list[tuple[str, int]] = [("", -1)] * count
    for name, places, numbers in schedule.samples(first, count):
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            assert found[place][0] == ""
            found[place] = (name, number)
    return found


# --- schedules ------------------------------------------------------------------------------------


def test_a_single_source_has_the_plain_order_whatever_the_mixture() -> None:
    for mixture in (
        Proportional(),
        weights({"a": 3}),
        Temperature(kind="temperature", temperature=2),
    ):
        assert taken_in(schedule_of(mixture, {"a": 100}), 40, 150) == [
            ("a", number) for number in range(40, 190)
        ]


def test_proportional_takes_every_sample_once_an_epoch() -> None:
    schedule = schedule_of(Proportional(), {"a": 700, "b": 41, "c": 3})
    for epoch in range(3):
        expected = {
            (name, number)
            for name, size in (("a", 700), ("b", 41), ("c", 3))
            for number in range(epoch * size, epoch * size + size)
        }
        assert set(taken_in(schedule, epoch * 744, 744)) == expected


def test_shares_follow_weights_and_temperature() -> None:
    counts = Counter(
        name
        for name, _ in taken_in(
            schedule_of(weights({"a": 0.7, "b": 0.3, "c": 0}), {"a": 10, "b": 10, "c": 10}), 0, 1000
        )
    )
    assert counts == {"a": 700, "b": 300}
    sizes = {"a": 1600, "b": 100}
    counts = Counter(
        name
        for name, _ in taken_in(
            schedule_of(Temperature(kind="temperature", temperature=2), sizes), 0, 1000
        )
    )
    assert counts == {"a": 800, "b": 200}
    counts = Counter(
        name
        for name, _ in taken_in(
            schedule_of(Temperature(kind="temperature", temperature=1), sizes), 0, 1700
        )
    )
    assert abs(counts["a"] - 1600) <= 1


def test_weights_are_the_decimal_numbers_that_were_written() -> None:
    rare = schedule_of(weights({"a": 1, "b": 1e-9}), {"a": 10, "b": 10})
    for samples in (10**6, 10**9, 10**12):
        assert abs(rare.taken(samples)["b"] - samples * Fraction(1, 10**9 + 1)) < 1
    tenths = schedule_of(weights({"a": 0.7, "b": 0.3}), {"a": 10, "b": 10})
    assert (
        tenths.taken(10**8) == {"a": 7 * 10**7, "b": 3 * 10**7}
        and tenths.taken(10**12)["b"] == 3 * 10**11
    )
    squares = schedule_of(Temperature(kind="temperature", temperature=2), {"a": 3, "b": 7})
    share = Fraction((3 / 7) ** 0.5) / (1 + Fraction((3 / 7) ** 0.5))
    assert abs(squares.taken(10**12)["a"] - share * 10**12) < 1


def test_limits_are_those_of_decimal_numbers() -> None:
    # In floats, 0.29 * 100 is below 29.
    schedule = schedule_of(weights({"a": 1, "b": 1}, {"a": 0.29}), {"a": 100, "b": 100})
    assert schedule.taken(1000) == {"a": 29, "b": 971}


def test_shares_count_from_the_sample_on_at_which_they_change() -> None:
    sizes = {"a": 100, "b": 100, "c": 50}
    first = MixtureEntry(
        0,
        weights({"a": 0.5, "b": 0.3, "c": 0.2}),
        {name: SourceState(name, size) for name, size in sizes.items()},
        S,
    )
    taken = MixtureSchedule([first]).taken(777)
    second = MixtureEntry(
        777,
        weights({"a": 0.1, "b": 1e-5, "c": 0.2}),
        {name: SourceState(name, size, taken[name]) for name, size in sizes.items()},
        S,
    )
    schedule = MixtureSchedule([first, second])
    for samples in (778, 1000, 10**7, 10**11):
        for name, share in zip(
            sizes, (Fraction(10000, 30001), Fraction(1, 30001), Fraction(20000, 30001)), strict=True
        ):
            assert abs(schedule.taken(samples)[name] - taken[name] - share * (samples - 777)) < 1


def test_a_plan_of_the_order_before_is_refused_if_it_mixes_sources() -> None:
    two = MixtureEntry(
        0, Proportional(), {"a": SourceState("a", 5), "b": SourceState("b", 7)}, S
    ).to_dict()
    assert MixtureEntry.from_dict(json.loads(json.dumps(two))).sources["b"].num_samples == 7
    one = MixtureEntry(0, Proportional(), {"a": SourceState("a", 5)}, S).to_dict()
    for content in (two, one):
        del content["version"]
    with pytest.raises(DataError, match="earlier version.*initial_weights"):
        MixtureEntry.from_dict(two)
    assert MixtureEntry.from_dict(one).sources["a"].num_samples == 5


def test_a_token_budget_is_met_exactly_by_the_whole_run() -> None:
    mixture = TokenBudget(kind="tokens", tokens={"a": 4000, "b": 400, "c": 0})
    counts = Counter(
        name for name, _ in taken_in(schedule_of(mixture, {"a": 50, "b": 1000, "c": 9}), 0, 1100)
    )
    assert counts == {"a": 1000, "b": 100}


@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.tuples(st.integers(1, 60), st.floats(0.01, 5), st.floats(0.2, 4)),
        min_size=1,
    ),
    st.integers(0, 300),
    st.integers(1, 50),
)
@settings(max_examples=80, deadline=None)
def test_limits_are_kept_and_ranges_agree_with_the_whole(
    sources: dict[str, tuple[int, float, float]], first: int, count: int
) -> None:
    sizes = {name: size for name, (size, _, _) in sources.items()}
    limits = {
        name: int(Fraction(repr(epochs)) * size) for name, (size, _, epochs) in sources.items()
    }
    mixture = weights(
        {name: weight for name, (_, weight, _) in sources.items()},
        {name: epochs for name, (_, _, epochs) in sources.items()},
    )
    schedule = schedule_of(mixture, sizes)
    assert schedule.num_samples == sum(limits.values())
    whole = taken_in(schedule, 0, schedule.num_samples)
    for name, limit in limits.items():
        assert [number for other, number in whole if other == name] == list(range(limit))
    first = min(first, schedule.num_samples)
    count = min(count, schedule.num_samples - first)
    assert taken_in(schedule, first, count) == whole[first : first + count]
    assert schedule.taken(first) == {
        name: sum(other == name for other, _ in whole[:first]) for name in sizes
    }
    with pytest.raises(DataError, match=f"allows {schedule.num_samples} samples"):
        schedule.samples(schedule.num_samples, 1)


def test_the_others_share_the_weight_of_an_exhausted_source() -> None:
    schedule = schedule_of(
        weights({"a": 2, "b": 1, "c": 1}, {"a": 1}), {"a": 100, "b": 1000, "c": 1000}
    )
    first, second = (phase.start_sample for phase in schedule.segments)
    assert first == 0 and second in (199, 200) and schedule.num_samples is None
    before, after = (
        Counter(name for name, _ in taken_in(schedule, first, 100)) for first in (0, 200)
    )
    assert before == {"a": 50, "b": 25, "c": 25} and after == {"b": 50, "c": 50}


def test_names_that_do_not_fit_the_data_are_refused() -> None:
    for mixture, words in (
        (weights({"code": 1, "wbe": 1}), "names 'wbe'.*did you mean 'web'"),
        (weights({"code": 1}), "does not name the source 'web'"),
        (weights({"code": 0, "web": 0}), "0 for every source"),
        (Proportional(max_epochs={"x": 1}), "max_epochs names 'x'.*code, web"),
        (
            TokenBudget(kind="tokens", tokens={"web": 5}),
            "data.mixture.tokens does not name the source 'code'",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            check_names(mixture, ["code", "web"])
    check_names(weights({"code": 1, "web": 0}, {"web": 2}), ["code", "web"])


# --- the loader -----------------------------------------------------------------------------------


def loader_of(
    folder: Path, sizes: Sizes, mixture: Mixture, dp_rank: int = 0, dp_size: int = 1
) -> ShardLoader:
    sources = {}
    for name, size in sizes.items():
        place = folder / name
        stream = (
            open_split(load_manifest(place), "train")
            if place.exists()
            else counting_stream(place, size * S + 1)
        )
        sources[name] = TrainingSource(Windows(stream, S, 0), f"{name} {size}")
    return ShardLoader(sources, [LoaderPhase(mixture, 8, 2)], 3, dp_rank, dp_size)


def steps_of(loader: ShardLoader, first: int, count: int) -> list[tuple[str, int]]:
    return [
        sample for step in range(first, first + count) for sample in loader.sample_numbers(step)
    ]


def test_one_source_is_read_in_todays_order(tmp_path: Path) -> None:
    loader = loader_of(tmp_path, {"a": 30}, Proportional())
    assert [number for _, number in steps_of(loader, 0, 9)] == sample_indices(0, 72, 30, 3).tolist()
    other = loader_of(tmp_path, {"a": 30}, Proportional())
    other.seed = 4
    assert steps_of(other, 0, 3) != steps_of(loader, 0, 3)


def test_after_any_step_of_a_run_each_source_has_its_share_of_the_samples(tmp_path: Path) -> None:
    sizes = {"a": 60, "b": 25, "c": 11, "d": 9, "e": 40}
    shares = {
        "a": Fraction("0.6"),
        "b": Fraction("0.25"),
        "c": Fraction("0.1"),
        "d": Fraction("0.049"),
        "e": Fraction("0.001"),
    }
    loader = loader_of(
        tmp_path, sizes, weights({name: float(share) for name, share in shares.items()})
    )
    read: Counter[str] = Counter()
    for step in range(130):
        read.update(origin.source for origin in loader.origins(step))
        assert all(
            abs(read[name] - share * 8 * (step + 1)) < 1 for name, share in shares.items()
        ), step
        assert loader.consumed(step + 1).by_source == {name: read[name] for name in sizes}
    assert read["e"] in (1, 2) and len(loader.step_batches(129)) == 4


def test_every_source_passes_through_its_own_epochs(tmp_path: Path) -> None:
    loader = loader_of(tmp_path, {"a": 40, "b": 15}, weights({"a": 1, "b": 1}))
    by_source = defaultdict(list)
    for name, number in steps_of(loader, 0, 15):
        by_source[name].append(number)
    assert len(by_source["a"]) == len(by_source["b"]) == 60
    assert sorted(by_source["a"][:40]) == list(range(40))
    epochs = [by_source["b"][start : start + 15] for start in range(0, 60, 15)]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs) and epochs[0] != epochs[1]


def test_micro_batches_of_a_mixture_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    def first_tokens(dp_size: int) -> list[list[int]]:
        ranks = [
            loader_of(
                tmp_path, {"a": 40, "b": 15}, weights({"a": 3, "b": 1}), rank, dp_size
            ).step_batches(2)
            for rank in range(dp_size)
        ]
        return [
            rank[turn].input_ids_BS[:, 0].tolist()
            for turn in range(len(ranks[0]))
            for rank in ranks
        ]

    assert first_tokens(1) == first_tokens(4)


@pytest.mark.parametrize(
    "before,after",
    [
        (Proportional(), weights({"a": 1, "b": 5})),
        (weights({"a": 4, "b": 1}), weights({"a": 1, "b": 4})),
        (weights({"a": 4, "b": 1}), weights({"a": 1, "b": 1, "c": 2})),
        (weights({"a": 4, "b": 1, "c": 1}), weights({"a": 1, "c": 1})),
        (weights({"a": 4, "b": 1}), Proportional(max_epochs={"a": 2})),
    ],
)
def test_a_run_that_resumes_with_another_mixture_repeats_nothing_before_its_epoch_ends(
    tmp_path: Path, before: Mixture, after: Mixture
) -> None:
    sizes = {"a": 70, "b": 40, "c": 50}

    def of(mixture: Mixture) -> ShardLoader:
        names = mixture.weights if isinstance(mixture, Weights) else ("a", "b")
        return loader_of(tmp_path, {name: sizes[name] for name in names}, mixture)

    first, second = of(before), of(after)
    seen = steps_of(first, 0, 7)
    second.resume(json.loads(json.dumps(first.state(7))), 7)
    seen += steps_of(second, 7, 5)
    for name, size in sizes.items():
        numbers = [number for other, number in seen if other == name]
        for start in range(0, len(numbers), size):
            assert len(set(numbers[start : start + size])) == len(numbers[start : start + size]), (
                name
            )
    assert second.schedule.entries[-1].start_sample == 56 and len(second.schedule.entries) == 2
    # The same recipe again continues with the same plans, to the same samples.
    third = of(after)
    third.resume(json.loads(json.dumps(second.state(9))), 9)
    assert (
        third.schedule.entries == second.schedule.entries and steps_of(third, 9, 3) == seen[72:96]
    )
    fresh = of(after)
    assert steps_of(fresh, 7, 5) != seen[56:]


def test_a_source_that_comes_back_goes_on_where_it_was(tmp_path: Path) -> None:
    both, alone = {"a": 70, "b": 40}, {"a": 70}
    first = loader_of(tmp_path, both, weights({"a": 1, "b": 1}))
    second = loader_of(tmp_path, alone, Proportional())
    second.resume(first.state(4), 4)
    third = loader_of(tmp_path, both, weights({"a": 1, "b": 1}))
    third.resume(second.state(6), 6)
    assert third.schedule.taken(48) == {"a": 32, "b": 16}
    numbers = [
        number for name, number in steps_of(first, 0, 4) + steps_of(third, 6, 6) if name == "b"
    ]
    assert len(numbers) == len(set(numbers)) == 40


def test_changed_data_of_a_source_is_refused(tmp_path: Path) -> None:
    first = loader_of(tmp_path, {"a": 70, "b": 40}, Proportional())
    changed = loader_of(tmp_path / "other", {"a": 71, "b": 40}, Proportional())
    with pytest.raises(DataError, match="source 'a' is not what it was"):
        changed.resume(first.state(3), 3)
    renamed = loader_of(tmp_path / "third", {"new": 71, "b": 40}, Proportional())
    renamed.resume(first.state(3), 3)
    assert renamed.schedule.taken(24)["new"] == 0


def test_too_small_limits_are_told_before_training(tmp_path: Path) -> None:
    loader = loader_of(tmp_path, {"a": 40, "b": 20}, weights({"a": 1, "b": 1}, {"a": 1, "b": 0.5}))
    loader.require(6)
    with pytest.raises(DataError, match="allows 50 samples of 4 tokens"):
        loader.require(7)


def test_a_saved_position_with_any_value_of_another_type_is_a_sentence(tmp_path: Path) -> None:
    sizes = {"a": 40, "b": 15}
    mixture = weights({"a": 3, "b": 1})
    state = json.loads(json.dumps(loader_of(tmp_path, sizes, mixture).state(3)))
    loader, refused = loader_of(tmp_path, sizes, mixture), 0
    for what, changed in damaged(state):
        try:
            loader.resume(changed, 3)
        except (CheckpointError, DataError) as error:
            assert "\n" not in str(error), what
            refused += 1
    # A number for another, and what has a default, may pass.
    assert refused > 0.8 * len(list(damaged(state)))
