"""The indices of data.order=megatron against a plain definition, document by document.

tests/integration/data_pipeline/test_megatron_order.py compares them with Megatron's own classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.megatron import blend, index
from data_pipeline.loading.megatron.blend import build_blend, normalized
from data_pipeline.loading.megatron.files import IndexFiles
from data_pipeline.loading.megatron.index import SampleIndices, build_indices, plan_epochs

LENGTHS = st.lists(st.integers(0, 12), min_size=2, max_size=20).filter(lambda part: sum(part) > 8)


def cuts_by_definition(
    lengths: list[int], order: list[int], length: int, samples: int
) -> list[list[int]]:
    """Sample boundaries, found by walking over one token at a time."""
    tokens = [
        [place, offset]
        for place, document in enumerate(order)
        for offset in range(lengths[document])
    ]
    return [[0, 0]] + [tokens[number * length] for number in range(1, samples + 1)]


@given(LENGTHS, st.integers(1, 8), st.integers(1, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_samples_are_the_tokens_of_the_shuffled_documents_back_to_back(
    lengths: list[int], length: int, wanted: int, seed: int
) -> None:
    found = build_indices(
        np.array(lengths, dtype=np.int32), range(len(lengths)), length, wanted, seed
    )
    plan = plan_epochs(sum(lengths), length, wanted)
    assert len(found) == plan.samples >= wanted
    assert (plan.epochs - 1) * sum(lengths) < wanted * length + 1 <= plan.epochs * sum(lengths)
    counts = np.bincount(found.documents, minlength=len(lengths))
    assert (counts == plan.epochs).all()
    assert found.samples.tolist() == cuts_by_definition(
        lengths, found.documents.tolist(), length, plan.samples
    )
    assert sorted(found.shuffle.tolist()) == list(range(plan.samples))
    if plan.has_separate_epoch:
        last = found.documents[-len(lengths) :]
        assert sorted(last.tolist()) == list(range(len(lengths)))
        assert max(found.shuffle[: plan.shuffled_together], default=-1) < plan.shuffled_together


def test_the_last_epoch_is_apart_below_80_percent() -> None:
    # 100 samples an epoch: of 1,001 tokens, 10 a sample.
    assert not plan_epochs(1001, 10, 100).has_separate_epoch
    assert plan_epochs(1001, 10, 101).has_separate_epoch
    assert plan_epochs(1001, 10, 179).has_separate_epoch
    assert not plan_epochs(1001, 10, 180).has_separate_epoch
    assert plan_epochs(1001, 10, None).epochs == 1


def test_blocks_of_documents_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(0, 30, 500).astype(np.int32)
    whole = build_indices(lengths, range(500), 17, 900, 3)
    monkeypatch.setattr(index, "BLOCK_DOCUMENTS", 7)
    parts = build_indices(lengths, range(500), 17, 900, 3)
    assert (whole.samples == parts.samples).all() and (whole.shuffle == parts.shuffle).all()


def blend_by_definition(weights: list[float], size: int) -> tuple[list[int], list[int]]:
    """One sample after the other."""
    shares = normalized(weights)
    counts = [0] * len(shares)
    sources, samples = [], []
    for number in range(size):
        behind = [
            share * max(number, 1.0) - count for share, count in zip(shares, counts, strict=True)
        ]
        source = behind.index(max(behind))
        sources.append(source)
        samples.append(counts[source])
        counts[source] += 1
    return sources, samples


@given(
    # Small whole numbers have ties, which rounding decides.
    st.lists(st.integers(1, 9) | st.floats(1e-3, 1.0), min_size=1, max_size=9),
    st.integers(1, 3000),
)
@settings(max_examples=60, deadline=None)
def test_parts_of_a_blend_at_the_same_time_are_the_blend_in_sequence(
    weights: list[float], size: int
) -> None:
    found = build_blend(weights, size)
    sources, samples = blend_by_definition(weights, size)
    assert found.sources.tolist() == sources and found.samples.tolist() == samples
    assert found.sources.dtype == np.int16 and found.samples.dtype == np.int64


def test_groups_of_parts_continue_where_the_one_before_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blend, "PARTS_AT_ONCE", 3)
    monkeypatch.setattr(blend, "PART_SAMPLES", 16)
    monkeypatch.setattr(blend, "SHORTEST_PART", 8)
    weights = [5.0, 3.0, 3.0, 1.0, 0.5]
    assert build_blend(weights, 1000).sources.tolist() == blend_by_definition(weights, 1000)[0]


def files_of(folder: Path, found: SampleIndices) -> IndexFiles:
    return IndexFiles(
        folder, "GPTDataset", {"seed": 1}, {"shuffle_index": (found.shuffle.dtype, (len(found),))}
    )


def test_files_that_are_cut_short_or_changed_are_found(tmp_path: Path) -> None:
    found = build_indices(np.full(9, 7, dtype=np.int32), range(9), 4, 15, 1)
    files = files_of(tmp_path / "order", found)
    assert files.load() is None and not files.are_whole()
    files.save({"shuffle_index": found.shuffle})
    loaded = files.load()
    assert loaded is not None and (loaded["shuffle_index"] == found.shuffle).all()
    assert files.are_whole()
    path = files.path("shuffle_index.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert not files.are_whole()
    path.write_bytes(whole[:-4])
    assert files.load() is None
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    assert files.load() is None and not files.are_whole()
