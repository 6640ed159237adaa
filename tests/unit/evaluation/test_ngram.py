from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.config import Mixture, Proportional, Weights
from data_pipeline.loading.batch import Batch
from data_pipeline.loading.packing import Windows
from data_pipeline.loading.plan import LoaderPhase
from data_pipeline.loading.seen_samples import seen_samples
from data_pipeline.loading.shard_loader import ShardLoader, TrainingSource
from pretrain.core.errors import DataError
from pretrain.evaluation.heldout.ngram import (
    MISSING,
    NGram,
    batch_pairs,
    fit_ngram,
    ngram_nll,
    sample_pairs,
)
from tests.support.data_folder import stream_of

VOCAB = 40


def markov_tokens(count: int, seed: int) -> np.ndarray:
    """Tokens in which each is followed by one of three others; ids 30 and above never occur."""
    generator = np.random.default_rng(seed)
    tokens = [0]
    for step in generator.choice([1, 5, 11], size=count - 1, p=[0.7, 0.2, 0.1]):
        tokens.append((tokens[-1] * 3 + int(step)) % 30)
    return np.array(tokens, dtype=np.int64)


def pairs_of(tokens: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Contexts, the nearest token first, and targets of one text."""
    batch = Batch(torch.from_numpy(tokens[:-1])[None], torch.from_numpy(tokens[1:])[None])
    return batch_pairs(batch, order)


def fitted(tokens: np.ndarray, order: int = 2, vocab_size: int = VOCAB) -> NGram:
    return fit_ngram([pairs_of(tokens, order)], vocab_size, order)


def by_definition(
    tokens: list[int], vocab_size: int, context: tuple[int, ...], target: int
) -> float:
    """Interpolated Kneser-Ney of order len(context) + 1, from counts of tuples; the context is in
    the order of the text.
    """
    tables: dict[int, dict[tuple[int, ...], int]] = {}
    highest = len(context) + 1
    counts = Counter(
        tuple(tokens[place : place + highest]) for place in range(len(tokens) - highest + 1)
    )
    for size in range(highest, 0, -1):
        tables[size] = dict(counts)
        counts = Counter(gram[1:] for gram in counts)

    def probability(size: int) -> float:
        if size == 0:
            return 1 / vocab_size
        table, seen = tables[size], context[len(context) - size + 1 :]
        lower = probability(size - 1)
        mine = {gram: count for gram, count in table.items() if gram[:-1] == seen}
        if not mine:
            return lower
        singles, doubles = (sum(count == wanted for count in table.values()) for wanted in (1, 2))
        discount = singles / (singles + 2 * doubles) if singles else 0.5
        total = sum(mine.values())
        return (
            max(mine.get((*seen, target), 0) - discount, 0) / total
            + discount * len(mine) / total * lower
        )

    return probability(highest)


def every_context(order: int) -> np.ndarray:
    """Random contexts [300, n - 1] of all tokens, some of which are shorter."""
    contexts = np.random.default_rng(9).integers(0, 30, (300, order - 1))
    for missing in range(1, order):
        contexts[missing * 20 : missing * 20 + 20, order - 1 - missing :] = MISSING
    return contexts


def sums_over_vocabulary(model: NGram, contexts: np.ndarray) -> np.ndarray:
    return model.probabilities(contexts[:, None, :], np.arange(model.vocab_size)[None, :]).sum(
        axis=1
    )


def test_the_bigram_agrees_with_a_hand_computed_example() -> None:
    # N(0,1)=2, N(0,2)=1, N(1,2)=1: n1=2, n2=1, D=1/2. Continuations 0,1,2 of 3: D_low=1/3, and 2 of
    # 3 tokens share 2/9 evenly.
    bigram = fit_ngram([(np.array([[0], [0], [0], [1]]), np.array([1, 1, 2, 2]))], 3, 2)
    lower = [2 / 27, 8 / 27, 17 / 27]
    assert bigram.levels[1].discount == pytest.approx(1 / 2)
    assert bigram.probabilities([[0]], [0, 1, 2]) == pytest.approx(
        [2 / 81, 1 / 2 + 8 / 81, 1 / 6 + 17 / 81]
    )
    assert bigram.probabilities([[1]], [0, 1, 2]) == pytest.approx(
        [1 / 27, 4 / 27, 1 / 2 + 17 / 54]
    )
    for nothing_known in (2, MISSING):
        assert bigram.probabilities([[nothing_known]], [0, 1, 2]) == pytest.approx(lower)
    assert bigram.nll([[0], [2]], [2, 0]) == pytest.approx(
        -np.log(1 / 6 + 17 / 81) - np.log(2 / 27)
    )


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_the_definition(order: int) -> None:
    tokens = markov_tokens(400, seed=2)
    # Every n-gram of the text is a pair: the first targets have no full context and are left out.
    model = fit_ngram(
        [pairs_of(tokens, order)]
        if order > 1
        else [(np.empty((len(tokens), 0), np.int64), tokens)],
        VOCAB,
        order,
    )
    generator = np.random.default_rng(0)
    for place in generator.integers(order, len(tokens) - 1, 15):
        context, target = (
            tuple(tokens[place - order + 1 : place].tolist()),
            int(generator.choice([tokens[place], generator.integers(VOCAB)])),
        )
        expected = by_definition(tokens.tolist(), VOCAB, context, target)
        assert model.probabilities([context[::-1]], [target])[0] == pytest.approx(
            expected, rel=1e-12
        )


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_positive_and_sum_to_one_whatever_is_known_of_a_context(
    order: int,
) -> None:
    model = fitted(markov_tokens(5000, seed=0), order)
    contexts = every_context(order)
    assert np.abs(sums_over_vocabulary(model, contexts) - 1).max() < 1e-9
    assert model.probabilities(contexts[:, None, :], np.arange(VOCAB)[None, :]).min() > 0


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_sum_check_notices_a_wrong_backoff_weight(level: int) -> None:
    model = fitted(markov_tokens(5000, seed=0), 3)
    levels = list(model.levels)
    levels[level] = replace(levels[level], types=levels[level].types + 1)
    broken = replace(model, levels=tuple(levels))
    assert np.abs(sums_over_vocabulary(broken, every_context(3)) - 1).max() > 1e-5


def test_a_corpus_without_single_pairs_still_leaves_probability_for_the_unseen() -> None:
    bigram = fitted(np.tile(np.arange(4), 10), vocab_size=6)
    assert bigram.probabilities([[0]], [5])[0] > 0
    assert np.abs(sums_over_vocabulary(bigram, np.arange(6)[:, None]) - 1).max() < 1e-9


def unigram_nll(train: np.ndarray, targets: np.ndarray) -> float:
    counts = np.bincount(train, minlength=VOCAB) + 1.0
    return float(-np.log(counts / counts.sum())[targets].sum())


def scored(model: NGram, tokens: np.ndarray) -> float:
    return model.nll(*pairs_of(tokens, model.order)) / (len(tokens) - 1)


def test_the_bigram_beats_a_unigram_where_the_previous_token_matters() -> None:
    train, heldout = markov_tokens(5000, seed=0), markov_tokens(2000, seed=1)
    assert scored(fitted(train), heldout) < 0.5 * unigram_nll(train, heldout[1:]) / (
        len(heldout) - 1
    )
    assert scored(fitted(train, 1), heldout) == pytest.approx(
        unigram_nll(train, heldout[1:]) / (len(heldout) - 1), rel=0.01
    )


def test_the_bigram_wins_nothing_where_the_previous_token_says_nothing() -> None:
    train, heldout = (
        np.random.default_rng(seed).permutation(markov_tokens(5000, seed)) for seed in (0, 1)
    )
    assert scored(fitted(train), heldout) > 0.95 * unigram_nll(train, heldout[1:]) / (
        len(heldout) - 1
    )


def test_a_higher_order_wins_where_older_tokens_matter_and_loses_nothing_where_they_do_not() -> (
    None
):
    generator = np.random.default_rng(3)
    tokens = [0, 1, 2, 3]
    for noise in generator.integers(0, 12, 20_000):
        tokens.append((tokens[-4] * 5 + 1) % 12 if noise < 10 else int(noise))
    train, heldout = np.array(tokens[:16_000]), np.array(tokens[16_000:])
    assert scored(fitted(train, 5), heldout) < 0.75 * scored(fitted(train, 2), heldout)
    first_order = markov_tokens(8000, seed=0)
    assert scored(fitted(first_order, 5), markov_tokens(2000, seed=1)) < 1.15 * scored(
        fitted(first_order, 2), markov_tokens(2000, seed=1)
    )


@pytest.mark.parametrize("vocab_size", [VOCAB, 1_000_000])
def test_chunks_give_the_same_counts_as_one_array(vocab_size: int) -> None:
    """Five tokens of the large vocabulary do not fit in one number of 63 bits."""
    contexts, targets = pairs_of(markov_tokens(999, seed=3), 5)
    whole = fit_ngram([(contexts, targets)], vocab_size, 5)
    chunked = fit_ngram(
        zip(np.array_split(contexts, 7), np.array_split(targets, 7), strict=True), vocab_size, 5
    )
    for one, other in zip(whole.levels, chunked.levels, strict=True):
        assert (
            np.array_equal(one.codes, other.codes)
            and np.array_equal(one.counts, other.counts)
            and one.discount == other.discount
        )


def test_no_pairs_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DataError, match="--no-bigram"):
        fit_ngram([], VOCAB, 2)


def test_masked_labels_are_not_scored() -> None:
    bigram = fitted(markov_tokens(500, seed=0))
    labels = torch.tensor([[1, -100, 5], [-100, -100, 2]])
    batch = Batch(
        input_ids_BS=torch.tensor([[0, 1, 4], [3, 3, 9]]), labels_BS=labels, document_ids_BS=None
    )
    nats, targets = ngram_nll(bigram, [batch])
    assert targets == 3
    assert nats == pytest.approx(bigram.nll([[0], [4], [9]], [1, 5, 2]))


def test_pairs_stay_inside_the_chosen_windows_and_documents_and_skip_what_has_no_loss(
    tmp_path: Path,
) -> None:
    stream = stream_of(tmp_path, [[[5, 6, 0], [7, 8, 9, 0], [1, 2]]], vocab_size=VOCAB)
    ((contexts, targets),) = sample_pairs(Windows(stream, 4, 0), np.array([1, 0]), 3)
    assert contexts.tolist() == [
        [5, -1],
        [6, 5],
        [0, 6],
        [7, 0],
        [8, -1],
        [9, 8],
        [0, 9],
        [1, 0],
    ] and targets.tolist() == [6, 0, 7, 8, 9, 0, 1, 2]
    contexts, targets = next(
        sample_pairs(Windows(stream, 4, 0, document_mask=True), np.array([1]), 3)
    )
    assert contexts.tolist() == [[8, -1], [9, 8], [1, -1]] and targets.tolist() == [9, 0, 2]


@pytest.mark.parametrize(
    "mixture", [Proportional(), Weights(kind="weights", weights={"a": 3, "b": 1})]
)
def test_seen_samples_are_those_that_the_loader_gave_to_training(
    tmp_path: Path, mixture: Mixture
) -> None:
    streams = {
        name: stream_of(tmp_path / name, [[[token % VOCAB for token in range(size)]]], VOCAB)
        for name, size in (("a", 201), ("b", 152))
    }
    sources = {
        name: TrainingSource(Windows(stream, 10, 0), name) for name, stream in streams.items()
    }
    loader = ShardLoader(sources, [LoaderPhase(mixture, 8, 2)], 5, 0, 2)
    for steps in (1, 3, 4, 9):
        given = {sample for step in range(steps) for sample in loader.sample_numbers(step)}
        seen = seen_samples(loader.state(steps)["plans"], steps * 8, seed=5)
        assert {
            (name, number) for name, numbers in seen.items() for number in numbers.tolist()
        } == given
        assert sum(map(len, seen.values())) == len(given)
    other = seen_samples(loader.state(1)["plans"], 8, seed=6)
    assert {
        (name, number) for name, numbers in other.items() for number in numbers.tolist()
    } != set(loader.sample_numbers(0))
