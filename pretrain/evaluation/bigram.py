"""An interpolated Kneser-Ney bigram: the baseline that a transformer has to beat.

Chen & Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), interpolated Kneser-Ney with one discount
an order. With N the number of times a pair was seen and N1+ the number of distinct pairs,

    p(w | c) = max(N(c, w) - D, 0) / N(c)  +  D * N1+(c, .) / N(c) * p_low(w)
    p_low(w) = max(N1+(., w) - D_low, 0) / N1+(., .)  +  D_low * |{w: N1+(., w) > 0}| / N1+(., .) / V

Each discount is n1 / (n1 + 2 n2), where n1 and n2 are how many of the order's counts are one and two. The last term spreads what is left
evenly, so that every token of the vocabulary has a probability above zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.batch import NO_LOSS, Batch, Samples
from pretrain.config.errors import DataError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# The estimate n1 / (n1 + 2 n2) is zero where no count is one, and would leave nothing for what was never seen.
DISCOUNT_WITHOUT_SINGLES = 0.5

CHUNK_PAIRS = 4_000_000


@dataclass(frozen=True)
class Bigram:
    """Counts of a fitted bigram. ``codes`` are sorted and unique, code = context * vocab_size + target."""

    vocab_size: int
    discount: float
    codes: Ints
    counts: Ints
    context_counts_V: Ints
    context_types_V: Ints
    lower_order_V: Floats

    def probabilities(self, contexts: npt.ArrayLike, targets: npt.ArrayLike) -> Floats:
        """p(target | context) of each pair; two integer arrays that broadcast against each other give one of float64."""
        contexts_i, targets_i = np.broadcast_arrays(np.asarray(contexts, dtype=np.int64), np.asarray(targets, dtype=np.int64))
        codes = contexts_i * self.vocab_size + targets_i
        places = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        pair_counts = np.where(self.codes[places] == codes, self.counts[places], 0)
        totals = self.context_counts_V[contexts_i]
        divisor = np.maximum(totals, 1)
        seen = np.maximum(pair_counts - self.discount, 0.0) / divisor
        # A context that was never seen has nothing of its own to say: all its weight goes to the lower order.
        backoff = np.where(totals > 0, self.discount * self.context_types_V[contexts_i] / divisor, 1.0)
        return seen + backoff * self.lower_order_V[targets_i]

    def nll(self, contexts: npt.ArrayLike, targets: npt.ArrayLike) -> float:
        """Negative log likelihood of the pairs, summed, in nats."""
        return float(-np.log(self.probabilities(contexts, targets)).sum())


def fit_bigram(chunks: Iterable[tuple[Ints, Ints]], vocab_size: int) -> Bigram:
    """Fits the bigram to (contexts, targets) arrays of token ids, one chunk in memory at a time.

    Raises:
        DataError: when the chunks hold no pair at all.
    """
    codes, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for contexts, targets in chunks:
        chunk_codes, chunk_counts = np.unique(contexts.astype(np.int64) * vocab_size + targets, return_counts=True)
        merged, inverse = np.unique(np.concatenate([codes, chunk_codes]), return_inverse=True)
        summed = np.zeros(len(merged), np.int64)
        np.add.at(summed, inverse, np.concatenate([counts, chunk_counts]))
        codes, counts = merged, summed
    if not len(codes):
        raise DataError("the bigram has no training pairs, the checkpoint has seen no window of these shards: take a later one, or pass --no-bigram")
    contexts, targets = np.divmod(codes, vocab_size)
    context_counts_V = np.zeros(vocab_size, np.int64)
    np.add.at(context_counts_V, contexts, counts)
    return Bigram(
        vocab_size=vocab_size,
        discount=_discount(counts),
        codes=codes,
        counts=counts,
        context_counts_V=context_counts_V,
        context_types_V=np.bincount(contexts, minlength=vocab_size),
        lower_order_V=_lower_order(np.bincount(targets, minlength=vocab_size)),
    )


def _discount(counts: Ints) -> float:
    singles, doubles = int((counts == 1).sum()), int((counts == 2).sum())
    return singles / (singles + 2 * doubles) if singles else DISCOUNT_WITHOUT_SINGLES


def _lower_order(continuations_V: Ints) -> Floats:
    """p_low [V] from the number of distinct contexts of each target, interpolated with the uniform distribution."""
    discount, total = _discount(continuations_V), int(continuations_V.sum())
    left_over = discount * np.count_nonzero(continuations_V) / total
    return np.maximum(continuations_V - discount, 0.0) / total + left_over / len(continuations_V)


def sample_pairs(samples: Samples, numbers: Ints) -> Iterator[tuple[Ints, Ints]]:
    """(contexts, targets) of every label of these samples: what training took a loss on."""
    group = max(CHUNK_PAIRS // samples.sequence_length, 1)
    ordered = np.sort(numbers)
    for first in range(0, len(ordered), group):
        read = [samples.read(int(number)) for number in ordered[first : first + group]]
        contexts, labels = (np.concatenate(rows) for rows in zip(*((sample.inputs_S, sample.labels_S) for sample in read), strict=True))
        yield contexts[labels != NO_LOSS], labels[labels != NO_LOSS]


def bigram_nll(bigram: Bigram, batches: Iterable[Batch]) -> tuple[float, int]:
    """Summed nats and number of the targets in ``batches`` (a label of -100 is none): the same ones that a model is scored on."""
    nats, targets = 0.0, 0
    for batch in batches:
        inputs, labels = batch.input_ids_BS.numpy(), batch.labels_BS.numpy()
        scored = labels != NO_LOSS
        nats += bigram.nll(inputs[scored], labels[scored])
        targets += int(scored.sum())
    return nats, targets
