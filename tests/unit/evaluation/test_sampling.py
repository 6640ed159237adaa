"""Each sampler against transformers' own, against a plain definition, and in the order of both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.core.errors import ConfigError
from pretrain.evaluation.generation.generate import generate
from pretrain.evaluation.generation.sampling import (
    Sampling,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sampling_probabilities,
)

LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.0])


def test_temperature_sharpens_and_top_k_keeps_the_largest() -> None:
    assert sampling_probabilities(LOGITS, Sampling()) == pytest.approx(LOGITS.softmax(0))
    assert sampling_probabilities(LOGITS, Sampling(temperature=0.5)) == pytest.approx(
        (LOGITS * 2).softmax(0)
    )
    kept = sampling_probabilities(LOGITS, Sampling(top_k=2))
    assert kept.nonzero().flatten().tolist() == [1, 3]
    assert kept[1] / kept[3] == pytest.approx(torch.tensor(0.5).exp())
    assert sampling_probabilities(LOGITS, Sampling(top_k=99)) == pytest.approx(LOGITS.softmax(0))


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for top_p, kept in ((0.01, 1), (0.49, 1), (0.6, 2), (0.81, 3), (1.0, 4)):
        chosen = sampling_probabilities(probs.log(), Sampling(top_p=top_p))
        assert int((chosen > 0).sum()) == kept
        assert chosen.sum() == pytest.approx(1.0)


def test_samples_follow_the_distribution() -> None:
    def constant(added_BS: Tensor) -> Tensor:
        return LOGITS[None]

    drawn = generate(constant, [0], Sampling(seed=3), -1, range(4000))
    shares = torch.bincount(torch.tensor(drawn), minlength=5) / 4000
    assert (shares - LOGITS.softmax(0)).abs().max() < 0.03


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
    ],
)
def test_impossible_sampling_is_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError):
        Sampling(**{field: value})


def many_logits() -> Tensor:
    """From flat rows, of which top-k takes the most, to steep ones, of which min-p does."""
    return (
        torch.randn(40, 50, generator=torch.Generator().manual_seed(4))
        * torch.linspace(0.2, 4, 40)[:, None]
    )


def seen_ids() -> Tensor:
    return torch.randint(50, (40, 9), generator=torch.Generator().manual_seed(5))


def seen_mask() -> Tensor:
    return torch.zeros(40, 50, dtype=torch.bool).scatter(1, seen_ids(), True)


def test_each_sampler_is_that_of_transformers() -> None:
    from transformers.generation import logits_process as theirs

    logits, ids = many_logits(), seen_ids()
    assert torch.equal(
        penalize_repetition(logits, seen_mask(), 1.3),
        theirs.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits),
    )
    for top_k in (1, 5, 50, 80):
        assert torch.equal(
            keep_top_k(logits, top_k), theirs.TopKLogitsWarper(min(top_k, 50))(ids, logits)
        )
    for top_p in (0.1, 0.5, 0.9, 0.99):
        assert torch.equal(keep_top_p(logits, top_p), theirs.TopPLogitsWarper(top_p)(ids, logits))
    for min_p in (0.0, 0.05, 0.5, 1.0):
        assert torch.equal(keep_min_p(logits, min_p), theirs.MinPLogitsWarper(min_p)(ids, logits))


def test_all_samplers_together_come_in_transformers_order() -> None:
    from transformers.generation import logits_process as theirs

    logits, ids = many_logits(), seen_ids()
    sampling = Sampling(temperature=1.7, top_k=20, top_p=0.8, min_p=0.1, repetition_penalty=1.4)
    chain = [
        theirs.RepetitionPenaltyLogitsProcessor(1.4),
        theirs.TemperatureLogitsWarper(1.7),
        theirs.TopKLogitsWarper(20),
        theirs.TopPLogitsWarper(0.8),
        theirs.MinPLogitsWarper(0.1),
    ]

    def chained(processors: list[theirs.LogitsProcessor]) -> Tensor:
        expected = logits
        for processor in processors:
            expected = processor(ids, expected)
        return expected.softmax(dim=-1)

    ours = sampling_probabilities(logits, sampling, seen_mask())
    torch.testing.assert_close(ours, chained(chain))
    for left_out in range(5):
        assert not torch.allclose(ours, chained([*chain[:left_out], *chain[left_out + 1 :]])), (
            left_out
        )
    assert not torch.allclose(ours, chained([*chain[:1], chain[3], chain[1], chain[2], chain[4]]))


def test_min_p_and_the_repetition_penalty_follow_their_definitions() -> None:
    probs = torch.tensor([0.5, 0.26, 0.14, 0.1])
    for min_p, kept in ((0.0, 4), (0.19, 4), (0.25, 3), (0.5, 2), (0.53, 1), (1.0, 1)):
        assert int(keep_min_p(probs.log(), min_p).isfinite().sum()) == kept
    seen = torch.tensor([True, True, True, False, False])
    assert penalize_repetition(LOGITS, seen, 2.0) == pytest.approx(
        torch.tensor([0.05, 1.0, -2.0, 1.5, 0.0])
    )


def test_a_repetition_penalty_counts_the_prompt_and_what_was_written_and_also_when_greedy() -> None:
    steady = torch.tensor([[3.0, 2.9, 2.8, 0.1, -5.0]])
    penalized = generate(
        lambda added_BS: steady, [1], Sampling(greedy=True, repetition_penalty=10.0), -1, range(4)
    )
    assert penalized == [0, 2, 0, 0]
    assert generate(lambda added_BS: steady, [1], Sampling(greedy=True), -1, range(4)) == [
        0,
        0,
        0,
        0,
    ]
