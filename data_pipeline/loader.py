"""From shards to batches: fixed windows of the token stream, in an order that depends on nothing but the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline import order
from data_pipeline.indexed import IndexedReader, bin_path
from data_pipeline.manifest import Manifest
from data_pipeline.split import SplitName
from pretrain.config.errors import ConfigError, DataError

NO_LOSS = -100
PADDING_WINDOW = -1


@dataclass(frozen=True)
class Batch:
    """One micro batch.

    Attributes:
        input_ids_BS: int64.
        labels_BS: int64, the next token of each input; -100 where no loss is taken.
        document_ids_BS: int64, number of the document inside the window, from 0; None without a document mask.
    """

    input_ids_BS: Tensor
    labels_BS: Tensor
    document_ids_BS: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        documents = None if self.document_ids_BS is None else self.document_ids_BS.to(device)
        return Batch(self.input_ids_BS.to(device), self.labels_BS.to(device), documents)


class TokenStream:
    """The tokens of all shards of one split, as one stream across documents and shards."""

    def __init__(self, shards: list[IndexedReader], vocab_size: int) -> None:
        self.shards, self.vocab_size = shards, vocab_size
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in shards)])

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1: int64 [count].

        Raises:
            IndexError: where the stream does not have them.
            DataError: for a token id that the vocabulary does not have; it names the shard.
        """
        if not 0 <= start <= start + count <= self.num_tokens:
            raise IndexError(f"tokens {start} to {start + count} of a stream of {self.num_tokens}")
        result = np.empty(count, dtype=np.int64)
        filled = 0
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < count:
            inside = start + filled - int(self._starts[number])
            part = self.shards[number].tokens[inside : inside + count - filled]
            self._check(part, self.shards[number])
            result[filled : filled + len(part)] = part
            filled += len(part)
            number += 1
        return result

    def _check(self, part: np.ndarray, shard: IndexedReader) -> None:
        if part.size and (part.max() >= self.vocab_size or part.min() < 0):
            raise DataError(
                f"{bin_path(shard.prefix)} holds token ids from {part.min()} to {part.max()}, but its tokenizer has {self.vocab_size} entries: "
                "it is damaged, or belongs to another tokenizer; build the data again with tools/preprocess_data.py --fresh"
            )


def open_split(folder: Path | str, manifest: Manifest, split: SplitName) -> TokenStream:
    """The token stream of a data folder's split.

    Raises:
        DataError: for shards that are missing, damaged, or not those of the manifest.
    """
    shards = []
    for entry in manifest.splits[split].shards:
        reader = IndexedReader(Path(folder) / entry.prefix)
        if (reader.num_tokens, reader.dtype.name) != (entry.tokens, manifest.dtype):
            raise DataError(
                f"{bin_path(reader.prefix)} holds {reader.num_tokens} tokens of {reader.dtype.name}, "
                f"its manifest says {entry.tokens} of {manifest.dtype}: build the data again with tools/preprocess_data.py --fresh"
            )
        shards.append(reader)
    return TokenStream(shards, manifest.tokenizer.vocab_size)


class Windows:
    """Fixed windows of S tokens with one target each: window i has inputs i*S .. i*S + S - 1, and labels one token further.

    Attributes:
        num_full: windows whose S targets all exist; training uses these.
        num_all: the same and a shorter last one, if any: together they score each token but the first exactly once.
    """

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self.stream, self.sequence_length = stream, sequence_length
        targets = max(stream.num_tokens - 1, 0)
        self.num_full = targets // sequence_length
        self.num_all = -(-targets // sequence_length)

    def read(self, window: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of a window, each int64 [S]. A missing tail is ``pad_id`` and -100; so is all of the window -1."""
        length = self.sequence_length
        inputs, labels = np.full(length, pad_id, dtype=np.int64), np.full(length, NO_LOSS, dtype=np.int64)
        if window == PADDING_WINDOW:
            return inputs, labels
        if not 0 <= window < self.num_all:
            raise IndexError(f"window {window} of {self.num_all}")
        start = window * length
        targets = min(length, self.stream.num_tokens - 1 - start)
        tokens = self.stream.read(start, targets + 1)
        inputs[:targets], labels[:targets] = tokens[:-1], tokens[1:]
        return inputs, labels

    def batch(self, windows: np.ndarray, document_mask: bool, eod_id: int) -> Batch:
        """The batch of these windows [B]. With ``document_mask`` no loss is taken on the first token of the next document."""
        pairs = [self.read(int(window), eod_id) for window in windows]
        inputs_BS, labels_BS = np.stack([inputs for inputs, _ in pairs]), np.stack([labels for _, labels in pairs])
        if not document_mask:
            return Batch(torch.from_numpy(inputs_BS), torch.from_numpy(labels_BS))
        ends_BS = inputs_BS == eod_id
        labels_BS[ends_BS] = NO_LOSS
        # The end-of-document token still belongs to the document that it ends.
        documents_BS = np.cumsum(ends_BS, axis=1) - ends_BS
        return Batch(torch.from_numpy(inputs_BS), torch.from_numpy(labels_BS), torch.from_numpy(documents_BS))


class TrainLoader:
    """One rank's training batches, a pure function of the step: to resume, ask for the next step.

    Micro batch number j of a step holds its samples j * micro_batch_size onwards, and goes to rank j % dp_size. So with a fixed micro batch
    size the step's micro batches are the same for any number of ranks; they only lie on other ones. A background thread reads one
    step ahead.

    Args:
        windows: the training split.
        seed: of the sample order.
        global_batch_size, micro_batch_size: in sequences.
        dp_rank, dp_size: this rank's number among the data-parallel ranks, and how many there are.
        document_mask, eod_id: see :meth:`Windows.batch`.

    Raises:
        ConfigError: where the micro batches do not divide evenly among the ranks.
        DataError: where the data has fewer samples than one step needs.
    """

    def __init__(
        self,
        windows: Windows,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        document_mask: bool,
        eod_id: int,
    ) -> None:
        if global_batch_size % (micro_batch_size * dp_size):
            raise ConfigError(
                f"train.global_batch_size ({global_batch_size}) is no multiple of micro_batch_size x data-parallel ranks "
                f"({micro_batch_size} x {dp_size}): change the batch sizes or the number of ranks"
            )
        if windows.num_full < global_batch_size:
            raise DataError(
                f"the training split has {windows.num_full} samples of {windows.sequence_length} tokens, but a step over {dp_size} ranks needs "
                f"{global_batch_size}: add data, shorten train.sequence_length, or lower train.global_batch_size and start fewer ranks"
            )
        self.windows, self.seed = windows, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.document_mask, self.eod_id = document_mask, eod_id
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="train-loader")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def sample_indices(self, step: int) -> np.ndarray:
        """Window numbers of the whole step, over all ranks: int64 [global_batch_size]."""
        return order.sample_indices(step * self.global_batch_size, self.global_batch_size, self.windows.num_full, self.seed)

    def step_batches(self, step: int) -> list[Batch]:
        """This rank's micro batches of a step (from 0), one for each gradient accumulation step."""
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead is not None and ahead[0] == step else self._read(step)
        self._ahead = (step + 1, self._reader.submit(self._read, step + 1))
        return batches

    def _read(self, step: int) -> list[Batch]:
        micro_batches = self.sample_indices(step).reshape(-1, self.micro_batch_size)
        return [self.windows.batch(windows, self.document_mask, self.eod_id) for windows in micro_batches[self.dp_rank :: self.dp_size]]


def validation_batches(
    windows: Windows,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    max_windows: int | None,
    document_mask: bool,
    eod_id: int,
) -> Iterator[Batch]:
    """One rank's validation batches, in the stream's order; every rank gets the same number, so that collectives match.

    All windows, the shorter last one too, or ``max_windows`` of them, evenly spread and always the same. Micro batch j goes to rank
    j % dp_size; what is missing at the end is windows without loss.

    Raises:
        DataError: where the split has no target at all.
    """
    if windows.num_all == 0:
        raise DataError(
            f"the validation split has {windows.stream.num_tokens} tokens, and so none to predict: add data or raise data.validation_share"
        )
    count = windows.num_all if max_windows is None else min(max_windows, windows.num_all)
    chosen = np.arange(count) * windows.num_all // count
    padded = np.full(-(-count // (micro_batch_size * dp_size)) * micro_batch_size * dp_size, PADDING_WINDOW)
    padded[:count] = chosen
    mine = padded.reshape(-1, micro_batch_size)[dp_rank::dp_size]
    return (windows.batch(numbers, document_mask, eod_id) for numbers in mine)
