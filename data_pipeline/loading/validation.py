"""Batches of the validation split: the same windows at every validation, divided among ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_pipeline.loading.batch import Batch, to_batch
from data_pipeline.loading.packing import PADDING_WINDOW, Windows
from pretrain.core.errors import DataError


def windows_per_batch(
    windows: Windows, dp_size: int, max_windows: int | None, batch_tokens: int
) -> int:
    """How many windows of ``batch_tokens`` tokens together one rank reads at once, at least one.

    Of as few batches as these tokens allow, all have almost the same size, so that the last one is
    hardly padded.
    """
    per_round = max(batch_tokens // windows.sequence_length, 1) * dp_size
    count = _count(windows, max_windows)
    rounds = max(-(-count // per_round), 1)
    return max(-(-count // (rounds * dp_size)), 1)


def _count(windows: Windows, max_windows: int | None) -> int:
    return windows.num_all if max_windows is None else min(max_windows, windows.num_all)


def validation_batches(
    windows: Windows, batch_size: int, dp_rank: int, dp_size: int, max_windows: int | None
) -> Iterator[Batch]:
    """One rank's validation batches, in the stream's order.

    Reads all windows, including the shorter last one, or ``max_windows`` of them, evenly spread and
    always the same. Batch j goes to rank j % dp_size. Every rank gets the same number of
    batches, padded with windows without loss: a rank that ran out would leave the others waiting in
    a collective.

    Raises:
        DataError: if the split has no target at all.
    """
    if windows.num_all == 0:
        raise DataError(
            f"the validation split has {windows.stream.num_tokens} tokens, and so none to predict: "
            "add data or raise data.validation_share"
        )
    count = _count(windows, max_windows)
    chosen = np.arange(count) * windows.num_all // count
    windows_per_round = batch_size * dp_size
    padded = np.full(-(-count // windows_per_round) * windows_per_round, PADDING_WINDOW)
    padded[:count] = chosen
    mine = padded.reshape(-1, batch_size)[dp_rank::dp_size]
    return (to_batch([windows.read(number) for number in numbers]) for numbers in mine.tolist())
