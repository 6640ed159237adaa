"""The sample order of runs whose phases change batch size, sequence length and mixture."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import Proportional, Weights
from data_pipeline.loading.packing import Windows
from data_pipeline.loading.plan import LoaderPhase
from data_pipeline.loading.shard_loader import ShardLoader, TrainingSource
from pretrain.core.errors import ConfigError
from tests.support.data_folder import counting_stream

LONGEST = 8
SIZES = {"a": 40, "b": 24}
MORE_A, MORE_B = (
    Weights(kind="weights", weights=shares) for shares in ({"a": 3, "b": 1}, {"a": 1, "b": 3})
)


def sources_of(folder: Path, length: int = LONGEST) -> dict[str, TrainingSource]:
    """Streams of the numbers 1, 2, 3 ..., so that an input says which token of its source it is."""
    streams = {
        name: counting_stream(folder / f"{name}{length}", blocks * LONGEST + 1)
        for name, blocks in SIZES.items()
    }
    return {
        name: TrainingSource(Windows(stream, length, 0), name) for name, stream in streams.items()
    }


def loader_phases(
    parts: list[tuple[int, int, int]], mixture: Proportional | Weights | None = None
) -> list[LoaderPhase]:
    """Stretches of (sequence length, batch size, groups of blocks)."""
    found, step, block = [], 0, 0
    for length, batch, groups in parts:
        found.append(
            LoaderPhase(mixture or Proportional(), batch, 2, step, block, LONGEST // length)
        )
        step, block = step + groups * LONGEST // length, block + groups * batch
    return found


def steps_of(phases: list[LoaderPhase], groups: int) -> int:
    return phases[-1].first_step + groups * phases[-1].slices


def tokens_of(loader: ShardLoader, steps: range) -> list[tuple[str, int]]:
    """Every input token of the steps: its source and its number."""
    found = []
    for step in steps:
        names = [name for name, _ in loader.sample_numbers(step)]
        rows = [row for batch in loader.step_batches(step) for row in batch.input_ids_BS.tolist()]
        found += [(name, token) for name, row in zip(names, rows, strict=True) for token in row]
    return found


PARTS = st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([2, 4, 6]), st.integers(1, 3))


@given(st.lists(PARTS, min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_no_token_comes_twice_in_an_epoch_whatever_the_lengths(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, int, int]]
) -> None:
    phases = loader_phases(parts)
    loader = ShardLoader(sources_of(tmp_path_factory.mktemp("data")), phases, 5, 0, 1)
    tokens = tokens_of(loader, range(steps_of(phases, parts[-1][2])))
    blocks = sum(batch * groups for _, batch, groups in parts)
    assert len(tokens) == blocks * LONGEST
    if blocks <= sum(SIZES.values()):
        assert max(Counter(tokens).values()) == 1


def test_one_epoch_over_three_lengths_reads_every_token_once_and_a_shifted_phase_does_not(
    tmp_path: Path,
) -> None:
    parts = [(2, 4, 6), (8, 4, 4), (4, 6, 4)]  # 24 + 16 + 24 blocks of both sources' 64
    phases, sources = loader_phases(parts), sources_of(tmp_path)
    every = {
        (name, token) for name, blocks in SIZES.items() for token in range(1, blocks * LONGEST + 1)
    }
    tokens = tokens_of(ShardLoader(sources, phases, 5, 0, 1), range(steps_of(phases, 4)))
    assert len(tokens) == len(every) and set(tokens) == every
    last = phases[-1]
    shifted = [
        *phases[:-1],
        LoaderPhase(
            last.mixture,
            last.global_batch_size,
            2,
            last.first_step,
            last.first_block - 1,
            last.slices,
        ),
    ]
    assert (
        set(tokens_of(ShardLoader(sources, shifted, 5, 0, 1), range(steps_of(phases, 4)))) != every
    )


def test_shorter_sequences_are_the_windows_of_the_longest_with_the_labels_that_follow(
    tmp_path: Path,
) -> None:
    loader = ShardLoader(sources_of(tmp_path), loader_phases([(2, 4, 1)]), 5, 0, 1)
    rows = [
        [row for batch in loader.step_batches(step) for row in batch.input_ids_BS.tolist()]
        for step in range(4)
    ]
    labels = [
        [row for batch in loader.step_batches(step) for row in batch.labels_BS.tolist()]
        for step in range(4)
    ]
    for place in range(4):
        whole = [token for step in rows for token in step[place]]
        assert whole == list(range(whole[0], whole[0] + LONGEST)) and (whole[0] - 1) % LONGEST == 0
        assert [token for step in labels for token in step[place]] == [token + 1 for token in whole]


def test_micro_batches_over_phases_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    phases, sources = loader_phases([(2, 4, 2), (8, 8, 1)], MORE_A), sources_of(tmp_path)

    def micro_batches(dp_size: int) -> list[list[list[int]]]:
        ranks = [ShardLoader(sources, phases, 5, rank, dp_size) for rank in range(dp_size)]
        steps = [[rank.step_batches(step) for rank in ranks] for step in range(9)]
        return [
            ranks[rank][turn].input_ids_BS.tolist()
            for ranks in steps
            for turn in range(len(ranks[0]))
            for rank in range(dp_size)
        ]

    assert micro_batches(1) == micro_batches(2)


@pytest.mark.parametrize("interrupted", range(1, 13))
def test_resumed_anywhere_the_samples_are_those_of_the_run_in_one(
    interrupted: int, tmp_path: Path
) -> None:
    one, two = (
        loader_phases([(4, 4, 2), (8, 6, 4)], MORE_A),
        loader_phases([(4, 4, 2), (8, 6, 2), (2, 4, 1)], MORE_B),
    )
    phases, sources = [one[0], two[1], two[2]], sources_of(tmp_path)
    straight = ShardLoader(sources, phases, 5, 0, 1)
    expected = tokens_of(straight, range(10))
    begun = ShardLoader(sources, phases, 5, 0, 1)
    again = ShardLoader(sources, phases, 5, 0, 1)
    again.resume(json.loads(json.dumps(begun.state(min(interrupted, 10)))), min(interrupted, 10))
    assert (
        again.schedule.entries == straight.schedule.entries and len(straight.schedule.entries) == 2
    )
    first = len(tokens_of(begun, range(min(interrupted, 10))))
    assert tokens_of(again, range(min(interrupted, 10), 10)) == expected[first:]


def test_a_changed_mixture_of_a_phase_holds_from_its_first_sample_and_sources_go_on(
    tmp_path: Path,
) -> None:
    one, two = (
        loader_phases([(8, 4, 4), (8, 4, 4)], MORE_A),
        loader_phases([(8, 4, 4), (8, 4, 4)], MORE_B),
    )
    loader = ShardLoader(sources_of(tmp_path), [one[0], two[1]], 5, 0, 1)
    shares = [
        Counter(name for step in steps for name, _ in loader.sample_numbers(step))
        for steps in (range(4), range(4, 8))
    ]
    assert shares == [{"a": 12, "b": 4}, {"a": 4, "b": 12}]
    assert max(Counter(tokens_of(loader, range(8))).values()) == 1
    assert [plan["start_sample"] for plan in loader.state(4)["plans"]] == [0]
    assert [plan["start_sample"] for plan in loader.state(5)["plans"]] == [0, 16]


def test_a_run_that_gets_longer_sequences_ahead_begins_new_epochs_and_resumes_from_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ShardLoader(sources_of(tmp_path, 4), [LoaderPhase(Proportional(), 4, 2)], 5, 0, 1)
    longer = [
        LoaderPhase(Proportional(), 4, 2, slices=2),
        LoaderPhase(Proportional(), 2, 2, first_step=4, first_block=8),
    ]
    changed, again = (
        ShardLoader(sources_of(tmp_path / str(number)), longer, 5, 0, 1) for number in range(2)
    )
    changed.resume(json.loads(json.dumps(short.state(3))), 3)
    told = capsys.readouterr().err
    assert (
        told.count("warning: ") == 1
        and "8 tokens now and was 4" in told
        and "name the longest sequence in the phases" in told
    )
    # Half of the short blocks are as many long ones: passes are of tokens, and continue where they
    # were.
    assert changed.epochs(3) == pytest.approx(short.epochs(3)) and short.epochs(3) == 12 / 128
    assert changed.epochs(9) - changed.epochs(4) == pytest.approx(10 / 64)
    tokens = tokens_of(changed, range(3, 9))
    assert max(Counter(tokens).values()) == 1 and len(tokens) == 16 + 5 * 16
    again.resume(json.loads(json.dumps(changed.state(6))), 6)
    assert tokens_of(again, range(6, 9)) == tokens[3 * 16 :] and again.epochs(9) == changed.epochs(
        9
    )
    assert capsys.readouterr().err == ""


def test_the_mixture_of_a_phase_is_called_by_its_place(tmp_path: Path) -> None:
    wrong = LoaderPhase(
        Weights(kind="weights", weights={"a": 1, "c": 1}), 4, 2, mixture_key="phases.late.mixture"
    )
    with pytest.raises(ConfigError, match=r"phases\.late\.mixture\.weights names 'c'"):
        ShardLoader(sources_of(tmp_path), [wrong], 5, 0, 1)


def test_going_back_over_a_border_passes_over_the_data_of_both_mixtures(tmp_path: Path) -> None:
    only_a, only_b = (
        Weights(kind="weights", weights=shares) for shares in ({"a": 1, "b": 0}, {"a": 0, "b": 1})
    )
    phases = [LoaderPhase(only_a, 2, 2), LoaderPhase(only_b, 2, 2, first_step=5, first_block=10)]
    sources = sources_of(tmp_path)
    straight, loader, resumed = (ShardLoader(sources, phases, 5, 0, 1) for _ in range(3))
    tokens = {step: set(tokens_of(straight, range(step, step + 1))) for step in range(9)}
    saved = json.loads(json.dumps(loader.state(4)))
    for behind in (
        7,
        6,
    ):  # twice from step 6 to step 4: the second time what was read in between is passed over too
        consumed = loader.consumed(behind)
        loader.resume(saved, 4)
        loader.pass_over(4, consumed)
    # Step 4 reads a, of which five steps were taken and then one more; b continues after the two
    # and the one that were passed over.
    assert set(tokens_of(loader, range(4, 5))).isdisjoint(
        set().union(*(tokens[step] for step in range(5)))
    )
    assert set(tokens_of(loader, range(5, 6))) == tokens[8] and tokens[8].isdisjoint(
        tokens[5] | tokens[6] | tokens[7]
    )
    resumed.resume(json.loads(json.dumps(loader.state(6))), 6)
    assert [resumed.sample_numbers(step) for step in (6, 7)] == [
        loader.sample_numbers(step) for step in (6, 7)
    ]
