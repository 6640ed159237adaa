"""Interpolated Kneser-Ney n-grams: the baselines that a transformer has to beat.

Chen & Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998),
interpolated Kneser-Ney with one discount an order. Of order n with the context c of n - 1 tokens,
and c' without its oldest token,

    p_n(w | c) = max(N(c, w) - D, 0) / N(c, .)
                 + D * |{w: N(c, w) > 0}| / N(c, .) * p_{n-1}(w | c')

N is a count at the highest order. Below it is the number of distinct tokens that were seen before
(c, w). Each discount D is n1 / (n1 + 2 n2), where n1 and n2 are how many of the order's counts are
one and two. p_0 is uniform, so that every token has a probability above zero. For a context that
was never seen, p_n is p_{n-1}.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.loading.batch import NO_LOSS, Batch, Samples, to_batch
from pretrain.core.errors import DataError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# Contexts [P, n - 1], the nearest token first and -1 for a missing one, and targets [P].
Pairs = tuple[Ints, Ints]

# The estimate n1 / (n1 + 2 n2) is zero where no count is one, and would leave nothing for what was
# never seen.
DISCOUNT_WITHOUT_SINGLES = 0.5
CHUNK_PAIRS = 4_000_000
MISSING = -1


@dataclass(frozen=True)
class Level:
    """One order's counts.

    A context is a number, and so is a token behind it: code = context * vocab_size + target, sorted
    and unique.

    ``context_codes`` name the contexts of this order by those of the order below: code = shorter
    context * vocab_size + oldest token.
    """

    context_codes: Ints
    codes: Ints
    counts: Ints
    totals: Ints
    types: Ints
    discount: float


@dataclass(frozen=True)
class NGram:
    """A fitted model: ``levels`` from order 1 upwards."""

    vocab_size: int
    levels: tuple[Level, ...]

    @property
    def order(self) -> int:
        """n, the tokens of an n-gram."""
        return len(self.levels)

    def probabilities(self, contexts: npt.ArrayLike, targets: npt.ArrayLike) -> Floats:
        """p(target | context), float64 [P], of contexts [P, n - 1] and targets [P]."""
        targets_P = np.asarray(targets, dtype=np.int64)
        contexts_Pn = np.asarray(contexts, dtype=np.int64)
        size = np.broadcast_shapes(contexts_Pn.shape[:-1], targets_P.shape)
        targets_P = np.broadcast_to(targets_P, size)
        contexts_Pn = np.broadcast_to(contexts_Pn, (*size, self.order - 1))
        # p_0, from which each order is interpolated upwards.
        probs_P = np.full(size, 1.0 / self.vocab_size)
        # A node is the index of a context among those of its order; order 1 has only the empty one.
        nodes_P = np.zeros(size, np.int64)
        known_P = np.ones(size, bool)
        for number, level in enumerate(self.levels):
            if number:
                oldest_P = contexts_Pn[..., number - 1]
                nodes_P, found_P = _find(level.context_codes, nodes_P * self.vocab_size + oldest_P)
                known_P = known_P & found_P & (oldest_P != MISSING)
                nodes_P = np.where(known_P, nodes_P, 0)
            places_P, seen_P = _find(level.codes, nodes_P * self.vocab_size + targets_P)
            counts_P = np.where(seen_P, level.counts[places_P], 0)
            totals_P = level.totals[nodes_P]
            own_P = np.maximum(counts_P - level.discount, 0.0) / totals_P
            probs_P = np.where(
                known_P, own_P + level.discount * level.types[nodes_P] / totals_P * probs_P, probs_P
            )
        return probs_P

    def nll(self, contexts: npt.ArrayLike, targets: npt.ArrayLike) -> float:
        """Negative log likelihood of the targets, summed, in nats."""
        return float(-np.log(self.probabilities(contexts, targets)).sum())


def _find(sorted_codes: Ints, codes: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    places = np.minimum(np.searchsorted(sorted_codes, codes), len(sorted_codes) - 1)
    return places, sorted_codes[places] == codes


def fit_ngram(chunks: Iterable[Pairs], vocab_size: int, order: int) -> NGram:
    """Fits an n-gram of ``order`` to chunks of pairs; those with a shorter context are left out.

    Memory grows with distinct n-grams.

    Raises:
        DataError: if the chunks hold no pair at all.
    """
    rows = np.empty((0, order), np.int64)
    counts = np.empty(0, np.int64)
    for contexts, targets in chunks:
        chunk = np.column_stack(
            [contexts.astype(np.int64).reshape(len(targets), order - 1), targets]
        )
        chunk = chunk[(chunk >= 0).all(axis=1)]
        rows, counts = _unique_rows(
            np.concatenate([rows, chunk]),
            np.concatenate([counts, np.ones(len(chunk), np.int64)]),
            vocab_size,
        )
    if not len(rows):
        raise DataError(
            "the n-gram has no training pairs, the checkpoint has seen no window of these shards:"
            " take a later one, or pass --no-bigram"
        )
    nodes = [np.zeros(len(rows), np.int64)]
    context_codes = [np.zeros(1, np.int64)]
    for place in range(order - 1):
        found, inverse = np.unique(nodes[-1] * vocab_size + rows[:, place], return_inverse=True)
        context_codes.append(found)
        nodes.append(inverse.reshape(-1))
    levels = []
    shorter = nodes[-1]
    targets = rows[:, -1]
    for number in range(order - 1, -1, -1):
        codes, inverse = np.unique(shorter * vocab_size + targets, return_inverse=True)
        summed = np.bincount(inverse.reshape(-1), weights=counts).astype(np.int64)
        levels.append(_level(context_codes[number], codes, summed, vocab_size))
        # Below, each distinct n-gram of this order counts once.
        shorter, targets = np.divmod(codes, vocab_size)
        shorter = context_codes[number][shorter] // vocab_size
        counts = np.ones(len(codes), np.int64)
    return NGram(vocab_size, tuple(reversed(levels)))


def _level(context_codes: Ints, codes: Ints, counts: Ints, vocab_size: int) -> Level:
    contexts = codes // vocab_size
    totals = np.bincount(contexts, weights=counts, minlength=len(context_codes)).astype(np.int64)
    singles = int((counts == 1).sum())
    doubles = int((counts == 2).sum())
    discount = singles / (singles + 2 * doubles) if singles else DISCOUNT_WITHOUT_SINGLES
    return Level(
        context_codes,
        codes,
        counts,
        totals,
        np.bincount(contexts, minlength=len(context_codes)),
        discount,
    )


def _unique_rows(rows: Ints, counts: Ints, vocab_size: int) -> tuple[Ints, Ints]:
    """Distinct rows and the sums of their counts.

    As many tokens as fit are compared as one number.
    """
    # As many tokens as fit into a signed 64-bit integer.
    per_word = int(63 / np.log2(max(vocab_size, 2)))
    words = [
        _packed(rows[:, start : start + per_word], vocab_size)
        for start in range(0, rows.shape[1], per_word)
    ]
    # Sorting packed words is several times faster than np.unique(axis=0), which compares bytes.
    sorting = np.lexsort(words) if len(words) > 1 else np.argsort(words[0], kind="stable")
    begins = np.ones(len(rows), bool)
    begins[1:] = np.logical_or.reduce([np.diff(word[sorting]) != 0 for word in words])
    places = np.flatnonzero(begins)
    return rows[sorting[places]], (
        np.add.reduceat(counts[sorting], places) if len(places) else counts
    )


def _packed(columns: Ints, vocab_size: int) -> Ints:
    packed = np.zeros(len(columns), np.int64)
    for column in columns.T:
        packed = packed * vocab_size + column
    return packed


def batch_pairs(batch: Batch, order: int) -> Pairs:
    """Pairs of contexts and targets in a batch.

    A target is every label but -100; its context has up to n - 1 tokens before it, of the same
    document.
    """
    inputs_BS, labels_BS = batch.input_ids_BS.numpy(), batch.labels_BS.numpy()
    documents_BS = None if batch.document_ids_BS is None else batch.document_ids_BS.numpy()
    contexts_BSn = np.full((*inputs_BS.shape, order - 1), MISSING, np.int64)
    for back in range(min(order - 1, inputs_BS.shape[1])):
        here = slice(back, None)
        before = slice(None, inputs_BS.shape[1] - back)
        tokens_BS = inputs_BS[:, before]
        contexts_BSn[:, here, back] = (
            tokens_BS
            if documents_BS is None
            else np.where(documents_BS[:, here] == documents_BS[:, before], tokens_BS, MISSING)
        )
    scored_BS = labels_BS != NO_LOSS
    return contexts_BSn[scored_BS], labels_BS[scored_BS]


def sample_pairs(samples: Samples, numbers: Ints, order: int) -> Iterator[Pairs]:
    """The pairs of these samples: what training took a loss on."""
    group = max(CHUNK_PAIRS // samples.sequence_length, 1)
    # In the order of the files, which makes reading sequential.
    ordered = np.sort(numbers)
    for first in range(0, len(ordered), group):
        yield batch_pairs(
            to_batch([samples.read(int(number)) for number in ordered[first : first + group]]),
            order,
        )


def ngram_nll(ngram: NGram, batches: Iterable[Batch]) -> tuple[float, int]:
    """The summed nats and the number of the targets in ``batches``."""
    nats = 0.0
    count = 0
    for batch in batches:
        contexts, targets = batch_pairs(batch, ngram.order)
        nats += ngram.nll(contexts, targets)
        count += len(targets)
    return nats, count
