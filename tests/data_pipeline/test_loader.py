"""Windows, batches, and what each rank gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.build import BuildResult
from data_pipeline.indexed import IndexedReader, IndexedWriter, token_dtype
from data_pipeline.loader import NO_LOSS, Batch, TokenStream, TrainLoader, Windows, open_split, validation_batches
from pretrain.config.errors import ConfigError, DataError

EOD = 0


def stream_of(folder: Path, shards: list[list[list[int]]], vocab_size: int = 1000) -> TokenStream:
    readers = []
    for number, documents in enumerate(shards):
        with IndexedWriter(folder / f"shard{number}", token_dtype(vocab_size)) as writer:
            for tokens in documents:
                writer.add(np.array(tokens))
                writer.end_document()
            writer.finish()
        readers.append(IndexedReader(folder / f"shard{number}"))
    return TokenStream(readers, vocab_size)


def counting_stream(folder: Path, num_tokens: int) -> TokenStream:
    """Token i is i + 1, so a batch shows where it was read."""
    return stream_of(folder, [[list(range(1, num_tokens + 1))]], vocab_size=num_tokens + 1)


def train_loader(windows: Windows, dp_rank: int = 0, dp_size: int = 1, micro_batch_size: int = 2) -> TrainLoader:
    return TrainLoader(windows, 1, 8, micro_batch_size, dp_rank, dp_size, document_mask=False, eod_id=EOD)


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.input_ids_BS, other.input_ids_BS) and torch.equal(one.labels_BS, other.labels_BS)


def test_stream_reads_across_documents_and_shards(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [[[1, 2, 0], [3, 0]], [], [[4, 5, 6, 0]], [[7, 0]]])
    tokens = [1, 2, 0, 3, 0, 4, 5, 6, 0, 7, 0]
    assert stream.num_tokens == len(tokens)
    for start in range(len(tokens) + 1):
        for count in range(len(tokens) - start + 1):
            part = stream.read(start, count)
            assert part.dtype == np.int64 and part.tolist() == tokens[start : start + count]
    for start, count in ((-1, 2), (8, 4), (12, 0)):
        with pytest.raises(IndexError):
            stream.read(start, count)


def test_token_outside_the_vocabulary_names_its_shard(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [[[1, 2]], [[3, 99]]])
    stream.vocab_size = 99
    assert stream.read(0, 3).tolist() == [1, 2, 3]
    with pytest.raises(DataError, match=r"shard1\.bin holds token ids from 3 to 99"):
        stream.read(0, 4)


@pytest.mark.parametrize(("num_tokens", "full", "every"), [(1, 0, 0), (2, 0, 1), (5, 1, 1), (6, 1, 2), (9, 2, 2), (10, 2, 3)])
def test_windows_score_each_target_once(tmp_path: Path, num_tokens: int, full: int, every: int) -> None:
    windows = Windows(counting_stream(tmp_path, num_tokens), 4)
    assert (windows.num_full, windows.num_all) == (full, every)
    scored = []
    for window in range(windows.num_all):
        inputs, labels = windows.read(window, pad_id=EOD)
        assert len(inputs) == len(labels) == 4
        real = labels != NO_LOSS
        assert real.all() or window >= full
        assert (labels[real] == inputs[real] + 1).all()
        assert (inputs[~real] == EOD).all()
        scored += labels[real].tolist()
    assert scored == list(range(2, num_tokens + 1))


def test_document_mask_numbers_documents_and_takes_no_loss_across_their_ends(tmp_path: Path) -> None:
    windows = Windows(stream_of(tmp_path, [[[5, 6, 0], [7, 0], [8, 9, 10, 11, 0]]]), 6)
    plain = windows.batch(np.array([0, 1]), document_mask=False, eod_id=EOD)
    assert plain.document_ids_BS is None
    assert plain.labels_BS.tolist() == [[6, 0, 7, 0, 8, 9], [10, 11, 0, NO_LOSS, NO_LOSS, NO_LOSS]]
    masked = windows.batch(np.array([0, 1]), document_mask=True, eod_id=EOD)
    assert masked.document_ids_BS is not None
    assert masked.input_ids_BS.tolist() == [[5, 6, 0, 7, 0, 8], [9, 10, 11, 0, 0, 0]]
    assert masked.document_ids_BS.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 2]]
    assert masked.labels_BS.tolist() == [[6, 0, NO_LOSS, 0, NO_LOSS, 9], [10, 11, 0, NO_LOSS, NO_LOSS, NO_LOSS]]
    assert all(tensor.dtype == torch.int64 for tensor in (masked.input_ids_BS, masked.labels_BS, masked.document_ids_BS))


def test_an_epoch_shows_each_full_window_once(tmp_path: Path) -> None:
    windows = Windows(counting_stream(tmp_path, 24 * 4 + 3), 4)
    loader = train_loader(windows)
    inputs = torch.cat([batch.input_ids_BS for step in range(3) for batch in loader.step_batches(step)])
    assert sorted(inputs[:, 0].tolist()) == list(range(1, 24 * 4, 4))


def test_resuming_needs_only_the_step(tmp_path: Path) -> None:
    windows = Windows(counting_stream(tmp_path, 24 * 4 + 3), 4)
    straight, resumed = train_loader(windows), train_loader(windows)
    runs = [straight.step_batches(step) for step in range(8)]
    for step in (5, 6, 2):
        again = resumed.step_batches(step)
        assert len(again) == 4 and all(same(one, other) for one, other in zip(runs[step], again, strict=True))
    assert not same(runs[5][0], runs[6][0])


def micro_batch_inputs(windows: Windows, dp_size: int, micro_batch_size: int = 2) -> list[list[int]]:
    """First tokens of each micro batch of step 3, in the order of their numbers."""
    ranks = [train_loader(windows, rank, dp_size, micro_batch_size).step_batches(3) for rank in range(dp_size)]
    return [ranks[rank][accumulation].input_ids_BS[:, 0].tolist() for accumulation in range(len(ranks[0])) for rank in range(dp_size)]


def test_micro_batches_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    windows = Windows(counting_stream(tmp_path, 24 * 4 + 3), 4)
    one = micro_batch_inputs(windows, dp_size=1)
    assert one == micro_batch_inputs(windows, dp_size=2) == micro_batch_inputs(windows, dp_size=4)
    samples = train_loader(windows).sample_indices(3)
    assert [first for micro_batch in one for first in micro_batch] == (samples * 4 + 1).tolist()


def test_another_micro_batch_size_makes_other_micro_batches(tmp_path: Path) -> None:
    windows = Windows(counting_stream(tmp_path, 24 * 4 + 3), 4)
    assert micro_batch_inputs(windows, 1, micro_batch_size=2) != micro_batch_inputs(windows, 1, micro_batch_size=4)


def test_too_little_data_says_how_much_is_there_and_needed(tmp_path: Path) -> None:
    windows = Windows(counting_stream(tmp_path, 7 * 4 + 1), 4)
    with pytest.raises(DataError, match="has 7 samples of 4 tokens.* needs 8"):
        train_loader(windows)
    with pytest.raises(ConfigError, match="global_batch_size"):
        train_loader(windows, dp_size=3)


def labels_of(batches: list[Batch]) -> list[int]:
    labels = torch.cat([batch.labels_BS.flatten() for batch in batches])
    return labels[labels != NO_LOSS].tolist()


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [2, 9, 10, 50])
def test_validation_scores_each_target_once_over_all_ranks(tmp_path: Path, dp_size: int, num_tokens: int) -> None:
    windows = Windows(counting_stream(tmp_path, num_tokens), 4)
    ranks = [list(validation_batches(windows, 2, rank, dp_size, None, False, EOD)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.input_ids_BS.shape == (2, 4) for batches in ranks for batch in batches)
    assert sorted(label for batches in ranks for label in labels_of(batches)) == list(range(2, num_tokens + 1))


def test_a_rank_that_reads_another_ranks_batches_would_miss_targets(tmp_path: Path) -> None:
    windows = Windows(counting_stream(tmp_path, 50), 4)
    twice = [label for _ in range(2) for label in labels_of(list(validation_batches(windows, 2, 0, 2, None, False, EOD)))]
    assert sorted(twice) != list(range(2, 51))


def test_few_validation_windows_are_spread_and_do_not_depend_on_ranks(tmp_path: Path) -> None:
    windows = Windows(counting_stream(tmp_path, 100 * 4 + 1), 4)
    chosen = {
        dp_size: sorted(label for rank in range(dp_size) for label in labels_of(list(validation_batches(windows, 2, rank, dp_size, 5, False, EOD))))
        for dp_size in (1, 2)
    }
    assert chosen[1] == chosen[2]
    assert [label // 4 for label in chosen[1][::4]] == [0, 20, 40, 60, 80]


def test_validation_without_a_target_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 1 tokens"):
        validation_batches(Windows(counting_stream(tmp_path, 1), 4), 2, 0, 1, None, False, EOD)


def test_a_built_folder_opens_with_its_end_of_document_tokens(built: BuildResult) -> None:
    for split, entry in built.manifest.splits.items():
        stream = open_split(built.folder, built.manifest, split)
        tokens = stream.read(0, stream.num_tokens)
        assert stream.num_tokens == entry.tokens
        assert (tokens == built.manifest.tokenizer.eod_id).sum() == entry.documents
        assert tokens[-1] == built.manifest.tokenizer.eod_id


def test_shards_of_another_manifest_are_refused(built: BuildResult) -> None:
    train, validation = built.manifest.splits["train"], built.manifest.splits["validation"]
    swapped = built.manifest.model_copy(
        update={"splits": {"train": validation.model_copy(update={"shards": train.shards}), "validation": validation}}
    )
    open_split(built.folder, swapped, "train")
    wrong = train.shards[0].model_copy(update={"prefix": "validation"})
    broken = built.manifest.model_copy(update={"splits": {"train": train.model_copy(update={"shards": [wrong]}), "validation": validation}})
    with pytest.raises(DataError, match=r"validation\.bin holds"):
        open_split(built.folder, broken, "train")
