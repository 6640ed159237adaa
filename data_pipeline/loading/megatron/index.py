"""The indices of Megatron's GPTDataset, computed with numpy: the same bytes as Megatron's own.

A data set's documents, repeated for as many epochs as the run needs, are shuffled, and the tokens
in that order are cut into samples of S tokens (each with one more as its last label), which are
shuffled again. If the last epoch is used by less than 80 %, its documents and samples are shuffled
apart from those before it. So the order depends on how many samples are asked for.

Follows ``megatron/core/datasets/gpt_dataset.py`` and ``build_sample_idx`` of ``helpers.cpp`` in
megatron-core 0.16.1, which need torch.distributed and a compiler; neither is needed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Documents whose lengths are summed at a time: memory stays flat.
BLOCK_DOCUMENTS = 1 << 22
# A last epoch that is used by less is shuffled apart from the others.
LAST_EPOCH_THRESHOLD = 0.80
# What numpy's RandomState takes as a seed.
SEEDS = range(2**32)

Advance = Callable[[int], object]


@dataclass(frozen=True)
class EpochPlan:
    """How often the documents are repeated.

    Attributes:
        epochs: whole passes over the documents.
        samples: of all epochs; at least as many as were asked for.
        shuffled_together: those of the first ones that are shuffled among themselves; the rest is
            of the last epoch.
    """

    epochs: int
    samples: int
    shuffled_together: int

    @property
    def has_separate_epoch(self) -> bool:
        """Whether the last epoch is shuffled apart from those before it."""
        return self.shuffled_together < self.samples


def plan_epochs(tokens: int, sequence_length: int, num_samples: int | None) -> EpochPlan:
    """Return how often documents of ``tokens`` tokens are repeated for ``num_samples`` samples.

    Args:
        tokens: of one epoch, at least 1.
        num_samples: at least so many are made; None for those of one epoch.
    """
    wanted = 0 if num_samples is None else num_samples * sequence_length + 1
    epochs = max(-(-wanted // tokens), 1)
    samples = (epochs * tokens - 1) // sequence_length
    if epochs == 1 or num_samples is None:
        return EpochPlan(epochs, samples, samples)
    before_last = ((epochs - 1) * tokens - 1) // sequence_length
    per_epoch = (tokens - 1) // sequence_length
    is_separate = num_samples - before_last < int(LAST_EPOCH_THRESHOLD * per_epoch)
    return EpochPlan(epochs, samples, before_last if is_separate else samples)


@dataclass(frozen=True)
class SampleIndices:
    """The three indices of a GPTDataset, memory-mapped or in memory.

    Attributes:
        documents: int32 [epochs * documents], document numbers in the order of reading.
        samples: int32 or int64 [samples + 1, 2]: sample i begins at token [i, 1] of the document
            that entry [i, 0] of ``documents`` names, and its last label is the token that
            sample i + 1 begins with.
        shuffle: uint32 or int64 [samples]: place i of the order is sample shuffle[i].
    """

    documents: np.ndarray
    samples: np.ndarray
    shuffle: np.ndarray

    def __len__(self) -> int:
        return len(self.shuffle)


def build_indices(
    lengths: np.ndarray,
    documents: range,
    sequence_length: int,
    num_samples: int | None,
    seed: int,
    advance: Advance = lambda count: None,
) -> SampleIndices:
    """Return the indices that Megatron builds for these documents.

    Args:
        lengths: int32, tokens of every document of the data set.
        documents: the numbers of those that are in the split.
        num_samples: see :func:`plan_epochs`.
        seed: Megatron's ``--seed``, below 2^32.
        advance: called with the entries that are done, of :func:`num_entries` in all.
    """
    tokens = int(lengths[documents.start : documents.stop].sum(dtype=np.int64))
    plan = plan_epochs(tokens, sequence_length, num_samples)
    # One generator for all of it: each shuffle continues where the one before has ended.
    random = np.random.RandomState(seed)
    index = _document_index(documents, plan, random)
    advance(len(index))
    samples = _sample_index(lengths, index, sequence_length, plan.samples, advance)
    shuffle = _shuffle_index(plan, random)
    advance(len(shuffle))
    return SampleIndices(index, samples, shuffle)


def num_entries(documents: int, plan: EpochPlan) -> int:
    """Return what :func:`build_indices` counts as done in all."""
    return 2 * documents * plan.epochs + plan.samples


def _document_index(documents: range, plan: EpochPlan, random: np.random.RandomState) -> np.ndarray:
    numbers = np.arange(documents.start, documents.stop, dtype=np.int32)
    together = np.tile(numbers, plan.epochs - plan.has_separate_epoch)
    random.shuffle(together)
    if not plan.has_separate_epoch:
        return together
    random.shuffle(numbers)
    return np.concatenate([together, numbers])


def _sample_index(
    lengths: np.ndarray, order: np.ndarray, sequence_length: int, samples: int, advance: Advance
) -> np.ndarray:
    largest = max(len(order), int(lengths.max(initial=0)))
    dtype = np.int32 if largest <= np.iinfo(np.int32).max else np.int64
    index = np.zeros((samples + 1, 2), dtype=dtype)
    before = 0
    # The first sample begins at entry 0 even if that document is empty; sample k at token k * S.
    sample = 1
    for first in range(0, len(order), BLOCK_DOCUMENTS):
        sizes = lengths[order[first : first + BLOCK_DOCUMENTS]].astype(np.int64)
        ends = before + np.cumsum(sizes)
        before = int(ends[-1])
        last = min((before - 1) // sequence_length, samples)
        begins = np.arange(sample, last + 1, dtype=np.int64) * sequence_length
        places = np.searchsorted(ends, begins, side="right")
        index[sample : last + 1, 0] = first + places
        index[sample : last + 1, 1] = begins - (ends[places] - sizes[places])
        sample = max(sample, last + 1)
        advance(len(sizes))
    return index


def _shuffle_index(plan: EpochPlan, random: np.random.RandomState) -> np.ndarray:
    dtype = np.uint32 if plan.samples < np.iinfo(np.uint32).max - 1 else np.int64
    index = np.arange(plan.samples, dtype=dtype)
    random.shuffle(index[: plan.shuffled_together])
    if plan.has_separate_epoch:
        random.shuffle(index[plan.shuffled_together :])
    return index
