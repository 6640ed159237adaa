"""Packing: nothing is lost, nothing is read twice, labels are right, and padding stands at the end
only.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.batch import NO_LOSS, Samples, to_batch
from data_pipeline.loading.best_fit import (
    best_fit_decreasing,
    cut_documents,
    pack_path,
    pack_shard,
    pack_stream,
)
from data_pipeline.loading.packing import (
    PackedSamples,
    Windows,
    packing_statistics,
    prepare_packing,
)
from data_pipeline.loading.shard_loader import open_shard_loader
from data_pipeline.shards.datasets import load_datasets
from data_pipeline.shards.token_stream import TokenStream
from pretrain.config.load import load_recipe
from pretrain.config.loader_plan import loader_plan
from pretrain.core.errors import DataError, StorageError
from pretrain.model.decoder import DecoderLM
from tests.support.data_folder import EOD, stream_of, write_folder

PAD = 999
Documents = list[list[list[int]]]


def numbered(shards: list[list[int]]) -> Documents:
    """Documents of these lengths, by shard; every token occurs once, which identifies it."""
    token, result = 1, []
    for lengths in shards:
        result.append([])
        for length in lengths:
            result[-1].append(list(range(token, token + length)))
            token += length
    return result


def packed(stream: TokenStream, length: int, document_mask: bool = True) -> PackedSamples:
    pack_stream(stream, length)
    return PackedSamples(stream, length, PAD, document_mask)


def check_epoch(samples: Samples, documents: Documents, skipped: int = 0) -> None:
    """Every token is an input once, but the last ``skipped``; labels are the next tokens of the
    same document; padding stands at the end.
    """
    following = {
        one: other for shard in documents for document in shard for one, other in pairwise(document)
    }
    expected = [token for shard in documents for document in shard for token in document]
    document_of = {
        token: (i, j)
        for i, shard in enumerate(documents)
        for j, document in enumerate(shard)
        for token in document
    }
    seen: Counter[int] = Counter()
    for number in range(len(samples)):
        inputs, labels, ids = samples.read(number)
        assert ids is not None and len(inputs) == len(labels) == len(ids) == samples.sequence_length
        real = inputs != PAD
        assert not real[real.argmin() :].any() or real.all()
        assert (labels[~real] == NO_LOSS).all()
        for place, token in enumerate(inputs[real].tolist()):
            assert labels[place] == following.get(token, NO_LOSS)
        kept = inputs[real].tolist()
        for place in range(1, len(inputs)):
            changes = place >= len(kept) or (
                place > 0 and document_of[kept[place]] != document_of[kept[place - 1]]
            )
            assert ids[place] == ids[place - 1] + (1 if changes and place <= len(kept) else 0)
        seen.update(kept)
    assert seen == Counter(expected[: len(expected) - skipped])


lengths_of_shards = st.lists(
    st.lists(st.integers(1, 23), max_size=12), min_size=1, max_size=3
).filter(any)


@given(lengths_of_shards, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_best_fit_reads_every_token_of_every_document_once_an_epoch(
    shards: list[list[int]], length: int
) -> None:
    documents = numbered(shards)
    with tempfile.TemporaryDirectory() as folder:
        check_epoch(packed(stream_of(Path(folder), documents, 1000), length), documents)


@given(lengths_of_shards.filter(lambda shards: sum(map(sum, shards)) > 9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_windows_read_every_token_once_but_the_end_of_the_stream(
    shards: list[list[int]], length: int
) -> None:
    documents = numbered(shards)
    with tempfile.TemporaryDirectory() as folder:
        windows = Windows(stream_of(Path(folder), documents, 1000), length, PAD, document_mask=True)
        check_epoch(windows, documents, skipped=windows.stream.num_tokens - len(windows) * length)


def test_the_check_notices_a_document_that_is_read_twice(tmp_path: Path) -> None:
    documents = numbered([[5, 3, 9]])
    samples = packed(stream_of(tmp_path, documents), 4)
    check_epoch(samples, documents)
    samples._starts = samples._starts + np.array([0, 1])
    samples._shards[0].pieces = lambda sequence: [(0, 4)]
    with pytest.raises(AssertionError):
        check_epoch(samples, documents)


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_groups_are_placed_as_best_fit_decreasing_places_one_piece_after_the_other(
    lengths: list[int], slack: int
) -> None:
    capacity = max(lengths, default=1) + slack
    sequence_of, sequences = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, room in enumerate(rooms) if room >= length]
        place = min(fitting, key=lambda place: rooms[place]) if fitting else len(rooms)
        rooms[place:] = rooms[place:] or [capacity]
        rooms[place] -= length
    loads = [
        sum(length for length, owner in zip(lengths, sequence_of, strict=True) if owner == sequence)
        for sequence in range(sequences)
    ]
    assert sorted(capacity - load for load in loads) == sorted(rooms)


def test_only_documents_longer_than_a_sequence_are_cut() -> None:
    starts, lengths = cut_documents(np.array([0, 7, 9, 30]), np.array([7, 2, 21, 8]), 8)
    assert starts.tolist() == [0, 7, 9, 17, 25, 30] and lengths.tolist() == [7, 2, 8, 8, 5, 8]


def test_a_cut_document_has_a_label_at_the_cut_and_none_at_its_end(tmp_path: Path) -> None:
    stream = stream_of(
        tmp_path, [[[1, 2, 3, 4, 5, 6, 7, 8, EOD], [11, 12, EOD]], [[21, 22, 23, 24]]]
    )
    samples = packed(stream, 4)
    rows = [
        [row.tolist() for row in samples.read(number) if row is not None] for number in range(4)
    ]
    assert sorted(map(tuple, rows)) == [
        ([EOD, 11, 12, EOD], [NO_LOSS, 12, EOD, NO_LOSS], [0, 1, 1, 1]),
        ([1, 2, 3, 4], [2, 3, 4, 5], [0, 0, 0, 0]),
        ([5, 6, 7, 8], [6, 7, 8, EOD], [0, 0, 0, 0]),
        ([21, 22, 23, 24], [22, 23, 24, NO_LOSS], [0, 0, 0, 0]),
    ]
    assert packed(stream, 4, document_mask=False).read(0).documents_S is None
    with pytest.raises(IndexError):
        samples.read(4)


def test_statistics_count_padding_and_truncation(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": [[[1] * 9, [2] * 3]], "b": [[[3] * 4], []]})
    statistics = packing_statistics(load_datasets({"": str(tmp_path)}), 4)
    assert (
        statistics.sequences,
        statistics.tokens,
        statistics.documents,
        statistics.truncated_documents,
    ) == (4, 16, 3, 1)
    assert statistics.padding_share == 0 and statistics.truncated_share == pytest.approx(1 / 3)
    assert packing_statistics(load_datasets({"": str(tmp_path)}), 5).padding_share == pytest.approx(
        1 - 16 / 20
    )


def test_a_packing_is_made_once_and_again_for_other_shards(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, numbered([[5, 3], [4]]))
    with pytest.raises(DataError, match="pack-4.safetensors is missing"):
        PackedSamples(stream, 4, PAD)
    pack_stream(stream, 4)
    first, second = (pack_path(shard.prefix, 4) for shard in stream.shards)
    stamps = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    second.write_bytes(second.read_bytes()[:40])
    pack_stream(stream, 4)
    assert first.stat().st_mtime_ns == stamps[0] and second.stat().st_mtime_ns != stamps[1]
    for path in tmp_path.glob("train-*.[bi]*"):
        path.unlink()
    other = stream_of(tmp_path, numbered([[5, 2], [4]]))
    with pytest.raises(
        DataError, match="train-all-00000.pack-4.safetensors is missing or belongs to other shards"
    ):
        PackedSamples(other, 4, PAD)
    check_epoch(packed(other, 4), numbered([[5, 2], [4]]))


def test_the_packing_of_a_shard_does_not_change_from_run_to_run(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 400).tolist()
    stream = stream_of(tmp_path, [[[1] * length for length in lengths]])
    one, other = (pack_shard(stream.shards[0].open(), 32) for _ in range(2))
    assert np.array_equal(one.starts, other.starts) and np.array_equal(one.bounds, other.bounds)
    assert one.statistics.padding_share < 0.01


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, numbered([[5, 3]]))
    pack_path(stream.shards[0].prefix, 4).mkdir()
    with pytest.raises(StorageError, match="pack-4.safetensors.*data.packing.kind=concatenate"):
        pack_stream(stream, 4)


def test_the_loader_packs_as_the_recipe_says(tmp_path: Path) -> None:
    documents = numbered([[5, 30, 17, 9, 2, 44], [8, 8, 31]])
    write_folder(tmp_path, {"all": documents}, pad_id=PAD)
    settings_ = [
        "train.sequence_length=16",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        f"data.path={tmp_path}",
    ]
    recipe = load_recipe(
        "debug", [*settings_, "data.packing.kind=best_fit", "data.document_mask=true"]
    )
    datasets = load_datasets({"": str(tmp_path)})
    assert recipe.data.leaves_out_labels and prepare_packing(datasets, recipe.data, 16) is not None
    ranks = [
        open_shard_loader(recipe.data, datasets, loader_plan(recipe), rank, 2) for rank in range(2)
    ]
    alone = open_shard_loader(recipe.data, datasets, loader_plan(recipe), 0, 1)
    for step in range(3):
        apart = [loader.step_batches(step)[0].input_ids_BS for loader in ranks]
        assert torch.equal(
            torch.cat(apart), torch.cat([batch.input_ids_BS for batch in alone.step_batches(step)])
        )
    check_epoch(alone.sources["all"].samples, documents)
    plain = load_recipe("debug", settings_)
    assert not plain.data.leaves_out_labels and prepare_packing(datasets, plain.data, 16) is None
    assert isinstance(
        open_shard_loader(plain.data, datasets, loader_plan(plain), 0, 1).sources["all"].samples,
        Windows,
    )


def test_a_packed_document_has_the_logits_that_it_has_alone(tmp_path: Path) -> None:
    recipe = load_recipe("debug", ["model.vocab_size=100"])
    torch.manual_seed(0)
    model = DecoderLM(recipe.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.3)
    documents = [list(range(1, 20)), list(range(30, 41)), list(range(50, 70))]
    batch = to_batch(
        [Windows(stream_of(tmp_path, [documents], 100), 49, EOD, document_mask=True).read(0)]
    )
    with torch.inference_mode():
        together = model.logits(
            batch.input_ids_BS, batch.document_ids_BS, position_ids_BS=batch.position_ids_BS
        )[0]
        unmasked = model.logits(batch.input_ids_BS)[0]
        start = 0
        for document in documents[:2]:
            alone = model.logits(torch.tensor([document]))[0]
            assert torch.allclose(
                together[start : start + len(document)], alone, atol=1e-5, rtol=1e-5
            )
            assert start == 0 or not torch.allclose(
                unmasked[start : start + len(document)], alone, atol=1e-2
            )
            start += len(document)
