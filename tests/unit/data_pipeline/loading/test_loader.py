"""Windows, batches, and what each rank gets."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from data_pipeline.config import Proportional
from data_pipeline.loading.batch import NO_LOSS, Batch, to_batch
from data_pipeline.loading.packing import Windows
from data_pipeline.loading.plan import LoaderPhase
from data_pipeline.loading.shard_loader import ShardLoader, TrainingSource, open_shard_loader
from data_pipeline.loading.validation import validation_batches, windows_per_batch
from data_pipeline.shards.datasets import load_datasets
from data_pipeline.shards.index_header import HEADER, MAGIC
from data_pipeline.shards.indexed import bin_path
from data_pipeline.shards.manifest import ShardEntry
from data_pipeline.shards.token_stream import OPEN_FILES, Shard, TokenStream, open_split
from pretrain.config.load import load_recipe
from pretrain.config.loader_plan import loader_plan
from pretrain.core.errors import ConfigError, DataError
from tests.support.data_folder import EOD, counting_stream, stream_of, write_folder


def windows_of(folder: Path, num_tokens: int, sequence_length: int = 4) -> Windows:
    return Windows(counting_stream(folder, num_tokens), sequence_length, EOD)


def train_loader(
    windows: Windows, dp_rank: int = 0, dp_size: int = 1, micro_batch_size: int = 2
) -> ShardLoader:
    return ShardLoader(
        {"all": TrainingSource(windows, "same")},
        [LoaderPhase(Proportional(), 8, micro_batch_size)],
        1,
        dp_rank,
        dp_size,
    )


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.input_ids_BS, other.input_ids_BS) and torch.equal(
        one.labels_BS, other.labels_BS
    )


def test_stream_reads_across_documents_and_shards(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [[[1, 2, 0], [3, 0]], [], [[4, 5, 6, 0]], [[7, 0]]])
    tokens, starts = [1, 2, 0, 3, 0, 4, 5, 6, 0, 7, 0], {0, 3, 5, 9}
    assert stream.num_tokens == len(tokens)
    for start in range(len(tokens) + 1):
        for count in range(len(tokens) - start + 1):
            part = stream.read(start, count)
            assert part.dtype == np.int64 and part.tolist() == tokens[start : start + count]
            begins = stream.document_starts(start, count)
            assert begins.dtype == np.int64 and begins.tolist() == [
                i for i in range(count) if start + i in starts
            ]
    for start, count in ((-1, 2), (8, 4), (12, 0)):
        with pytest.raises(IndexError):
            stream.read(start, count)


def test_token_outside_the_vocabulary_names_its_shard(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [[[1, 2]], [[3, 99]]])
    stream.vocab_size = 99
    assert stream.read(0, 3).tolist() == [1, 2, 3]
    with pytest.raises(DataError, match=r"train-all-00001\.bin holds token ids from 3 to 99"):
        stream.read(0, 4)


@pytest.mark.parametrize(
    ("num_tokens", "full", "every"),
    [(1, 0, 0), (2, 0, 1), (5, 1, 1), (6, 1, 2), (9, 2, 2), (10, 2, 3)],
)
def test_windows_score_each_target_once(
    tmp_path: Path, num_tokens: int, full: int, every: int
) -> None:
    windows = windows_of(tmp_path, num_tokens)
    assert (len(windows), windows.num_all) == (full, every)
    scored = []
    for number in range(windows.num_all):
        inputs, labels, _ = windows.read(number)
        assert len(inputs) == len(labels) == 4
        real = labels != NO_LOSS
        assert real.all() or number >= full
        assert (labels[real] == inputs[real] + 1).all()
        assert (inputs[~real] == EOD).all()
        scored += labels[real].tolist()
    assert scored == list(range(2, num_tokens + 1))


def test_document_mask_numbers_documents_and_takes_no_loss_across_their_ends(
    tmp_path: Path,
) -> None:
    stream = stream_of(tmp_path, [[[5, 6, 0], [7, 0]], [[8, 9, 10, 11, 0]]])
    plain = to_batch([Windows(stream, 6, EOD).read(number) for number in (0, 1)])
    assert plain.document_ids_BS is None and plain.position_ids_BS is None
    assert plain.labels_BS.tolist() == [[6, 0, 7, 0, 8, 9], [10, 11, 0, NO_LOSS, NO_LOSS, NO_LOSS]]
    masked = to_batch(
        [Windows(stream, 6, EOD, document_mask=True).read(number) for number in (0, 1)]
    )
    assert masked.document_ids_BS is not None and masked.position_ids_BS is not None
    assert masked.input_ids_BS.tolist() == [[5, 6, 0, 7, 0, 8], [9, 10, 11, 0, 0, 0]]
    assert masked.document_ids_BS.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 1]]
    assert masked.position_ids_BS.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 1, 2]]
    assert masked.labels_BS.tolist() == [
        [6, 0, NO_LOSS, 0, NO_LOSS, 9],
        [10, 11, 0, NO_LOSS, NO_LOSS, NO_LOSS],
    ]
    tensors = (
        masked.input_ids_BS,
        masked.labels_BS,
        masked.document_ids_BS,
        masked.position_ids_BS,
    )
    assert all(tensor.dtype == torch.int64 for tensor in tensors)


def test_documents_are_told_by_the_index_and_not_by_a_token(tmp_path: Path) -> None:
    without_eod = stream_of(tmp_path / "without", [[[5, 6, 7], [8, 9], [10, 11]]])
    sample = Windows(without_eod, 6, EOD, document_mask=True).read(0)
    assert sample.documents_S is not None and sample.documents_S.tolist() == [0, 0, 0, 1, 1, 2]
    assert sample.labels_S.tolist() == [6, 7, NO_LOSS, 9, NO_LOSS, 11]
    eod_inside = stream_of(tmp_path / "inside", [[[5, 0, 7, 0, 9, 10, 11]]])
    sample = Windows(eod_inside, 6, EOD, document_mask=True).read(0)
    assert (
        sample.documents_S is not None
        and sample.documents_S.tolist() == [0] * 6
        and sample.labels_S.tolist() == [0, 7, 0, 9, 10, 11]
    )


def test_an_epoch_shows_each_full_window_once(tmp_path: Path) -> None:
    loader = train_loader(windows_of(tmp_path, 24 * 4 + 3))
    inputs = torch.cat(
        [batch.input_ids_BS for step in range(3) for batch in loader.step_batches(step)]
    )
    assert sorted(inputs[:, 0].tolist()) == list(range(1, 24 * 4, 4))


def test_resuming_needs_only_the_step(tmp_path: Path) -> None:
    windows = windows_of(tmp_path, 24 * 4 + 3)
    straight, resumed = train_loader(windows), train_loader(windows)
    runs = [straight.step_batches(step) for step in range(8)]
    for step in (5, 6, 2):
        again = resumed.step_batches(step)
        assert len(again) == 4 and all(
            same(one, other) for one, other in zip(runs[step], again, strict=True)
        )
    assert not same(runs[5][0], runs[6][0])


def micro_batch_inputs(
    windows: Windows, dp_size: int, micro_batch_size: int = 2
) -> list[list[int]]:
    """First tokens of each micro batch of step 3, in the order of their numbers."""
    ranks = [
        train_loader(windows, rank, dp_size, micro_batch_size).step_batches(3)
        for rank in range(dp_size)
    ]
    return [
        ranks[rank][accumulation].input_ids_BS[:, 0].tolist()
        for accumulation in range(len(ranks[0]))
        for rank in range(dp_size)
    ]


def test_micro_batches_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    windows = windows_of(tmp_path, 24 * 4 + 3)
    one = micro_batch_inputs(windows, dp_size=1)
    assert one == micro_batch_inputs(windows, dp_size=2) == micro_batch_inputs(windows, dp_size=4)
    samples = [sample for _, sample in train_loader(windows).sample_numbers(3)]
    assert [first for micro_batch in one for first in micro_batch] == [
        sample * 4 + 1 for sample in samples
    ]


def test_another_micro_batch_size_makes_other_micro_batches(tmp_path: Path) -> None:
    windows = windows_of(tmp_path, 24 * 4 + 3)
    assert micro_batch_inputs(windows, 1, micro_batch_size=2) != micro_batch_inputs(
        windows, 1, micro_batch_size=4
    )


def test_too_little_data_says_how_much_is_there_and_needed(tmp_path: Path) -> None:
    windows = windows_of(tmp_path, 7 * 4 + 1)
    with pytest.raises(DataError, match="has 7 samples of 4 tokens.* needs 8"):
        train_loader(windows)
    with pytest.raises(DataError, match="source 'all' is shorter than one sample"):
        train_loader(Windows(windows.stream, 40, EOD))
    with pytest.raises(ConfigError, match="global_batch_size"):
        train_loader(windows, dp_size=3)


def labels_of(batches: list[Batch]) -> list[int]:
    labels = torch.cat([batch.labels_BS.flatten() for batch in batches])
    return labels[labels != NO_LOSS].tolist()


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [2, 9, 10, 50])
def test_validation_scores_each_target_once_over_all_ranks(
    tmp_path: Path, dp_size: int, num_tokens: int
) -> None:
    windows = windows_of(tmp_path, num_tokens)
    ranks = [list(validation_batches(windows, 2, rank, dp_size, None)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.input_ids_BS.shape == (2, 4) for batches in ranks for batch in batches)
    assert sorted(label for batches in ranks for label in labels_of(batches)) == list(
        range(2, num_tokens + 1)
    )


def test_a_rank_that_reads_another_ranks_batches_would_miss_targets(tmp_path: Path) -> None:
    windows = windows_of(tmp_path, 50)
    twice = [
        label
        for _ in range(2)
        for label in labels_of(list(validation_batches(windows, 2, 0, 2, None)))
    ]
    assert sorted(twice) != list(range(2, 51))


def test_few_validation_windows_are_spread_and_do_not_depend_on_ranks(tmp_path: Path) -> None:
    windows = windows_of(tmp_path, 100 * 4 + 1)
    chosen = {
        dp_size: sorted(
            label
            for rank in range(dp_size)
            for label in labels_of(list(validation_batches(windows, 2, rank, dp_size, 5)))
        )
        for dp_size in (1, 2)
    }
    assert chosen[1] == chosen[2]
    assert [label // 4 for label in chosen[1][::4]] == [0, 20, 40, 60, 80]


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("max_windows", [None, 1, 5, 99])
@pytest.mark.parametrize("batch_tokens", [1, 12, 40, 4000])
def test_batches_of_tokens_score_each_target_once_with_little_padding(
    tmp_path: Path, dp_size: int, max_windows: int | None, batch_tokens: int
) -> None:
    windows = windows_of(tmp_path, 101 * 4)
    size = windows_per_batch(windows, dp_size, max_windows, batch_tokens)
    ranks = [
        list(validation_batches(windows, size, rank, dp_size, max_windows))
        for rank in range(dp_size)
    ]
    count = 101 if max_windows is None else max_windows
    assert 1 <= size <= max(batch_tokens // 4, 1)
    rounds = len(ranks[0])
    assert [len(batches) for batches in ranks] == [rounds] * dp_size
    # No batches more than the tokens need, and no batch that is more than one window too large.
    assert rounds == -(-count // (max(batch_tokens // 4, 1) * dp_size))
    assert 0 <= rounds * size * dp_size - count < rounds * dp_size
    whole = labels_of(list(validation_batches(windows, 2, 0, 1, max_windows)))
    assert sorted(label for batches in ranks for label in labels_of(batches)) == sorted(whole)


def test_validation_without_a_target_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 1 tokens"):
        validation_batches(windows_of(tmp_path, 1), 2, 0, 1, None)


def test_no_shard_is_opened_before_something_is_read_of_it(tmp_path: Path) -> None:
    documents = [list(range(1, 34))]
    manifest = write_folder(tmp_path, {"all": [documents, documents, documents]})
    bin_path(tmp_path / "train-all-00001").unlink()
    stream = open_split(manifest, "train")
    windows = Windows(stream, 4, EOD)
    train_loader(windows)
    assert (
        stream.num_tokens == 99
        and windows.read(0).inputs_S.tolist() == [1, 2, 3, 4]
        and windows.read(20).inputs_S.tolist() == [15, 16, 17, 18]
    )
    with pytest.raises(DataError, match=r"train-all-00001\.bin is missing"):
        windows.read(10)


def test_shards_of_another_manifest_are_refused(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path, {"all": [[[1, 2, 3]], [[4, 5]]]})
    one, other = manifest.splits["train"].shards
    swapped = [one.model_copy(update={"prefix": other.prefix}), other]
    broken = manifest.model_copy(
        update={
            "splits": {"train": manifest.splits["train"].model_copy(update={"shards": swapped})}
        }
    )
    with pytest.raises(
        DataError, match=r"train-all-00001\.bin holds 2 tokens of uint16, its manifest says 3"
    ):
        open_split(broken, "train").read(0, 2)
    with pytest.raises(DataError, match="has no validation split"):
        open_split(manifest, "validation")


def test_corpora_with_different_tokenizers_are_refused(tmp_path: Path) -> None:
    shards = {"all": [[list(range(1, 200))]]}
    for name, tokenizer in (("a", "{}"), ("b", "{}"), ("c", '{"other": 1}')):
        write_folder(tmp_path / name, shards, shards if name == "b" else None, tokenizer=tokenizer)
    datasets = load_datasets({"x": str(tmp_path / "a"), "y": str(tmp_path / "b")})
    datasets.verify()
    assert list(datasets.training_shards()) == ["x", "y"]
    held_out = datasets.validation_stream()
    assert held_out is not None and held_out.num_tokens == 199
    assert load_datasets({"": str(tmp_path / "a")}).validation_stream() is None
    with pytest.raises(DataError, match="different tokenizers"):
        load_datasets({"x": str(tmp_path / "a"), "z": str(tmp_path / "c")})


def test_windows_never_cross_from_one_source_to_the_next(tmp_path: Path) -> None:
    write_folder(
        tmp_path,
        {
            "low": [[list(range(1, 100))]],
            "high": [[list(range(500, 561))], [list(range(561, 620))]],
        },
    )
    datasets = load_datasets({"": str(tmp_path)})
    for folders in ({"": str(tmp_path)}, {"both": str(tmp_path)}):
        recipe = load_recipe(
            "debug",
            ["train.sequence_length=16", "train.global_batch_size=4", "train.micro_batch_size=4"],
        )
        loader = open_shard_loader(recipe.data, load_datasets(folders), loader_plan(recipe), 0, 1)
        assert sum(len(source.samples) for source in loader.sources.values()) == 6 + 7
        for step in range(4):
            tokens_BS = torch.cat([batch.input_ids_BS for batch in loader.step_batches(step)])
            assert ((tokens_BS < 500).all(dim=1) | (tokens_BS >= 500).all(dim=1)).all()
    assert list(datasets.training_shards()) == ["low", "high"] and list(loader.sources) == ["both"]


def test_waiting_for_batches_is_counted(tmp_path: Path) -> None:
    loader = train_loader(windows_of(tmp_path, 24 * 4 + 3))
    assert loader.prefetch_wait.seconds == 0.0
    loader.step_batches(0)
    assert loader.prefetch_wait.seconds > 0.0


def test_memory_and_open_files_do_not_grow_with_a_corpus_of_a_trillion_tokens(
    tmp_path: Path,
) -> None:
    """A sparse corpus of 500 shards of 2 * 10^9 tokens: the index of one of them, linked, and files
    of nothing but zeros.
    """
    documents, tokens, shards = 20_000, 2_000_000_000, 500
    lengths = np.full(documents, tokens // documents, dtype="<i4")
    offsets, marks = (
        np.arange(documents, dtype="<i8") * (2 * tokens // documents),
        np.arange(documents + 1, dtype="<i8"),
    )
    index = (
        HEADER.pack(MAGIC, 1, 8, documents, documents + 1)
        + lengths.tobytes()
        + offsets.tobytes()
        + marks.tobytes()
    )
    first = tmp_path / "00000.idx"
    first.write_bytes(index)
    entries = []
    for number in range(shards):
        if number:
            (tmp_path / f"{number:05}.idx").hardlink_to(first)
        with (tmp_path / f"{number:05}.bin").open("wb") as stream:
            stream.truncate(2 * tokens)
        entry = ShardEntry(
            prefix=f"{number:05}",
            source="all",
            documents=documents,
            tokens=tokens,
            bin_bytes=2 * tokens,
            bin_sha256="",
            idx_bytes=0,
            idx_sha256="",
        )
        entries.append(Shard(tmp_path, entry, "uint16"))
    me = psutil.Process()
    memory, files, started = me.memory_info().rss, me.num_fds(), time.perf_counter()
    loader = train_loader(Windows(TokenStream(entries, 1000), 2048, EOD, document_mask=True))
    loader.step_batches(0)
    assert time.perf_counter() - started < 2
    for step in range(60):
        loader.step_batches(step)
    assert loader.sources["all"].samples.stream.num_tokens == 10**12
    assert me.memory_info().rss - memory < 100e6 and me.num_fds() - files <= OPEN_FILES + 4
