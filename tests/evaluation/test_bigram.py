from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.batch import Batch
from data_pipeline.loader import TrainingSource, TrainLoader, seen_samples
from data_pipeline.packing import Windows
from pretrain.config.data_schema import Mixture, Proportional, Weights
from pretrain.config.errors import DataError
from pretrain.evaluation.bigram import Bigram, bigram_nll, fit_bigram, sample_pairs
from tests.data_pipeline.data_folder import stream_of

VOCAB = 40


def markov_tokens(count: int, seed: int) -> np.ndarray:
    """Tokens in which each is followed by one of three others; ids 30 and above never occur."""
    generator = np.random.default_rng(seed)
    tokens = [0]
    for step in generator.choice([1, 5, 11], size=count - 1, p=[0.7, 0.2, 0.1]):
        tokens.append((tokens[-1] * 3 + int(step)) % 30)
    return np.array(tokens, dtype=np.int64)


def fitted(tokens: np.ndarray, vocab_size: int = VOCAB) -> Bigram:
    return fit_bigram([(tokens[:-1], tokens[1:])], vocab_size)


def sums_over_vocabulary(bigram: Bigram) -> np.ndarray:
    every = np.arange(bigram.vocab_size)
    return bigram.probabilities(every[:, None], every[None, :]).sum(axis=1)


def test_the_bigram_agrees_with_a_hand_computed_example() -> None:
    # N(0,1)=2, N(0,2)=1, N(1,2)=1: n1=2, n2=1, D=1/2. Continuations 0,1,2 of 3: D_low=1/3, and 2 of 3 tokens share 2/9 evenly.
    bigram = fit_bigram([(np.array([0, 0, 0, 1]), np.array([1, 1, 2, 2]))], vocab_size=3)
    assert bigram.discount == pytest.approx(1 / 2)
    assert bigram.lower_order_V == pytest.approx([2 / 27, 8 / 27, 17 / 27])
    assert bigram.probabilities(0, [0, 1, 2]) == pytest.approx([2 / 81, 1 / 2 + 8 / 81, 1 / 6 + 17 / 81])
    assert bigram.probabilities(1, [0, 1, 2]) == pytest.approx([1 / 27, 4 / 27, 1 / 2 + 17 / 54])
    assert bigram.probabilities(2, [0, 1, 2]) == pytest.approx(bigram.lower_order_V)
    assert bigram.nll([0, 2], [2, 0]) == pytest.approx(-np.log(1 / 6 + 17 / 81) - np.log(2 / 27))


def test_probabilities_are_positive_and_sum_to_one_for_seen_and_unseen_contexts() -> None:
    bigram = fitted(markov_tokens(5000, seed=0))
    assert (bigram.context_counts_V == 0).any() and (bigram.context_counts_V > 0).any()
    assert np.abs(sums_over_vocabulary(bigram) - 1).max() < 1e-9
    every = np.arange(VOCAB)
    assert bigram.probabilities(every[:, None], every[None, :]).min() > 0


def test_the_sum_check_notices_a_wrong_backoff_weight() -> None:
    bigram = fitted(markov_tokens(5000, seed=0))
    broken = replace(bigram, context_types_V=bigram.context_types_V + 1)
    assert np.abs(sums_over_vocabulary(broken) - 1).max() > 1e-4


def test_a_corpus_without_single_pairs_still_leaves_probability_for_the_unseen() -> None:
    bigram = fitted(np.tile(np.arange(4), 10), vocab_size=6)
    assert bigram.probabilities(0, 5) > 0
    assert np.abs(sums_over_vocabulary(bigram) - 1).max() < 1e-9


def unigram_nll(train: np.ndarray, targets: np.ndarray) -> float:
    counts = np.bincount(train, minlength=VOCAB) + 1.0
    return float(-np.log(counts / counts.sum())[targets].sum())


def test_the_bigram_beats_a_unigram_where_the_previous_token_matters() -> None:
    train, heldout = markov_tokens(5000, seed=0), markov_tokens(2000, seed=1)
    assert fitted(train).nll(heldout[:-1], heldout[1:]) < 0.5 * unigram_nll(train, heldout[1:])


def test_the_bigram_wins_nothing_where_the_previous_token_says_nothing() -> None:
    train, heldout = (np.random.default_rng(seed).permutation(markov_tokens(5000, seed)) for seed in (0, 1))
    assert fitted(train).nll(heldout[:-1], heldout[1:]) > 0.95 * unigram_nll(train, heldout[1:])


def test_chunks_give_the_same_counts_as_one_array() -> None:
    tokens = markov_tokens(999, seed=3)
    contexts, targets = tokens[:-1], tokens[1:]
    whole = fit_bigram([(contexts, targets)], VOCAB)
    chunked = fit_bigram(zip(np.array_split(contexts, 7), np.array_split(targets, 7), strict=True), VOCAB)
    assert np.array_equal(whole.codes, chunked.codes) and np.array_equal(whole.counts, chunked.counts)
    assert np.array_equal(whole.lower_order_V, chunked.lower_order_V) and whole.discount == chunked.discount


def test_no_pairs_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DataError, match="--no-bigram"):
        fit_bigram([], VOCAB)


def test_masked_labels_are_not_scored() -> None:
    bigram = fitted(markov_tokens(500, seed=0))
    labels = torch.tensor([[1, -100, 5], [-100, -100, 2]])
    batch = Batch(input_ids_BS=torch.tensor([[0, 1, 4], [3, 3, 9]]), labels_BS=labels, document_ids_BS=None)
    nats, targets = bigram_nll(bigram, [batch])
    assert targets == 3
    assert nats == pytest.approx(bigram.nll([0, 4, 9], [1, 5, 2]))


def test_pairs_stay_inside_the_chosen_windows_and_skip_what_has_no_loss(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [[[5, 6, 0], [7, 8, 9, 0], [1, 2]]], vocab_size=VOCAB)
    pairs = [tuple(zip(*(side.tolist() for side in chunk), strict=True)) for chunk in sample_pairs(Windows(stream, 4, 0), np.array([1, 0]))]
    assert pairs == [((5, 6), (6, 0), (0, 7), (7, 8), (8, 9), (9, 0), (0, 1), (1, 2))]
    contexts, targets = next(sample_pairs(Windows(stream, 4, 0, document_mask=True), np.array([1])))
    assert contexts.tolist() == [8, 9, 1] and targets.tolist() == [9, 0, 2]


@pytest.mark.parametrize("mixture", [Proportional(), Weights(kind="weights", weights={"a": 3, "b": 1})])
def test_seen_samples_are_those_that_the_loader_gave_to_training(tmp_path: Path, mixture: Mixture) -> None:
    streams = {name: stream_of(tmp_path / name, [[[token % VOCAB for token in range(size)]]], VOCAB) for name, size in (("a", 201), ("b", 152))}
    sources = {name: TrainingSource(Windows(stream, 10, 0), name) for name, stream in streams.items()}
    loader = TrainLoader(sources, mixture, 5, 8, 2, 0, 2)
    for steps in (1, 3, 4, 9):
        given = {sample for step in range(steps) for sample in loader.sample_numbers(step)}
        seen = seen_samples(loader.state(steps)["plans"], steps * 8, 10, seed=5)
        assert {(name, number) for name, numbers in seen.items() for number in numbers.tolist()} == given
        assert sum(map(len, seen.values())) == len(given)
    other = seen_samples(loader.state(1)["plans"], 8, 10, seed=6)
    assert {(name, number) for name, numbers in other.items() for number in numbers.tolist()} != set(loader.sample_numbers(0))
