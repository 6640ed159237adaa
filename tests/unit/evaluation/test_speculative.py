"""Drafts change how many passes a text takes, and nothing about the text: not one greedy token, and
not the distribution of samples.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from pretrain.core.errors import ConfigError
from pretrain.evaluation.generation import speculative
from pretrain.evaluation.generation.generate import generate, native_next_logits
from pretrain.evaluation.generation.sampling import Sampling, sampling_probabilities
from pretrain.evaluation.generation.speculative import (
    DraftCounts,
    NativeDrafting,
    generate_with_drafts,
    residual,
    speculate,
)
from pretrain.model.decoder import DecoderLM
from tests.support.tiny_model import KINDS, random_tokens, tiny_model

CPU = torch.device("cpu")
MULTI_TOKEN = "model.multi_token_prediction={loss_weight: 0.3}"
DENSE = ("model.moe=null", "model.layer_pattern.kind=all_dense", "model.intermediate_size=48")
WINDOWED = (*DENSE, "model.attention.sliding_window=6")


def trained(*overrides: str) -> DecoderLM:
    """A model that has learned some of a simple sequence, so that some of its drafts are right and
    some are not.
    """
    model = tiny_model(MULTI_TOKEN, "model.initializer_range=0.1", *overrides)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    tokens = [random_tokens(8, 1)]
    for place in range(32):
        tokens.append((tokens[-1] * 3 + place % 5) % 100)
    tokens_BS = torch.cat(tokens, dim=1)
    for _ in range(15):
        optimizer.zero_grad()
        model(tokens_BS[:, :-1], tokens_BS[:, 1:], 256.0).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    "overrides",
    [(KINDS["dropless"],), (KINDS["deepspeed"],), WINDOWED],
    ids=["dropless", "deepspeed", "windowed"],
)
def test_greedy_decoding_gives_the_same_tokens(overrides: tuple[str, ...]) -> None:
    model, greedy = trained(*overrides), Sampling(greedy=True)
    for prompt in ([7], random_tokens(1, 9)[0].tolist()):
        plain = generate(
            native_next_logits(model, len(prompt) + 60, CPU), prompt, greedy, -1, range(60)
        )
        drafted, counts = generate_with_drafts(
            NativeDrafting(model, len(prompt) + 60, CPU), prompt, greedy, -1, range(60)
        )
        assert drafted == plain and len(set(plain)) > 3
        assert 0 < counts.accepted < counts.drafted < 60


def test_the_greedy_comparison_notices_a_cache_that_keeps_rejected_drafts() -> None:
    class Keeping(NativeDrafting):
        def forget_last(self) -> None:
            self._hidden_BSD = self._hidden_BSD[:, :-1]

    model, greedy = (
        tiny_model(MULTI_TOKEN).eval(),
        Sampling(greedy=True),
    )  # untrained: every token counts, and most drafts are wrong
    plain = generate(native_next_logits(model, 41, CPU), [7], greedy, -1, range(40))
    assert (
        generate_with_drafts(NativeDrafting(model, 100, CPU), [7], greedy, -1, range(40))[0]
        == plain
    )
    assert generate_with_drafts(Keeping(model, 100, CPU), [7], greedy, -1, range(40))[0] != plain


class Chain:
    """A model whose next token depends on the last one alone, by a table [V, V] of logits; its
    drafts come from another table.
    """

    def __init__(self, logits_VV: Tensor, draft_logits_VV: Tensor) -> None:
        self.logits_VV, self.draft_logits_VV = logits_VV, draft_logits_VV

    def extend(self, ids: list[int]) -> Tensor:
        return self.logits_VV[ids]

    def forget_last(self) -> None:
        pass

    def draft(self, next_ids: list[int]) -> Tensor:
        return self.draft_logits_VV[next_ids[-1]]


def chain() -> Chain:
    generator = torch.Generator().manual_seed(5)
    return Chain(torch.randn(5, 5, generator=generator), torch.randn(5, 5, generator=generator))


def excess(counts: Tensor, expected: Tensor) -> float:
    """How far chi-square is above its mean, in standard deviations: [rows, cells] counts against
    expected ones.

    What is expected less than five times in a row is one cell.
    """
    statistic, degrees = 0.0, -len(expected)
    for row, expected_row in zip(counts, expected, strict=True):
        assert row[expected_row == 0].sum() == 0
        rare = expected_row < 5
        pairs = [(row[~rare], expected_row[~rare])] + [
            (row[rare].sum()[None], expected_row[rare].sum()[None])
        ] * (expected_row[rare].sum() >= 5)
        for seen, wanted in pairs:
            statistic += float(((seen - wanted).square() / wanted).sum())
            degrees += len(wanted)
    return (statistic - degrees) / (2 * degrees) ** 0.5


def transition_excess(model: Chain, sampling: Sampling, tokens: int = 4000) -> float:
    ids, counts = generate_with_drafts(model, [0], sampling, -1, range(tokens))
    assert 0.2 < counts.accepted_share < 0.9
    pairs_VV = torch.zeros(5, 5)
    for before, after in zip([0, *ids], ids, strict=False):
        pairs_VV[before, after] += 1
    expected_VV = torch.stack([sampling_probabilities(row, sampling) for row in model.logits_VV])
    return excess(pairs_VV, expected_VV * pairs_VV.sum(dim=1, keepdim=True))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(seed=1), Sampling(seed=2, top_k=3), Sampling(seed=3, top_p=0.8, temperature=1.5)],
)
def test_samples_have_the_model_s_distribution_whatever_drafts_them(sampling: Sampling) -> None:
    assert abs(transition_excess(chain(), sampling)) < 4


def test_a_wrong_residual_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "residual", lambda p_V, q_V: p_V)
    assert transition_excess(chain(), Sampling(seed=1)) > 10


def test_a_perfect_draft_is_always_accepted() -> None:
    model = chain()
    model.draft_logits_VV = model.logits_VV
    _, counts = generate_with_drafts(model, [0], Sampling(seed=1), -1, range(200))
    assert counts.accepted == counts.drafted == 100


@torch.inference_mode()
def test_a_model_s_three_next_tokens_have_their_exact_joint_distribution() -> None:
    small = (
        "model.vocab_size=3",
        "model.num_hidden_layers=1",
        "model.initializer_range=0.4",
        *DENSE,
    )
    model, prompt, runs = tiny_model(MULTI_TOKEN, *small).eval(), [1, 0, 2], 500
    triples = torch.tensor(list(product(range(3), repeat=3)))
    logits = model.logits(torch.cat((torch.tensor([prompt]).expand(27, -1), triples), dim=1))
    exact_27 = (
        (logits[:, 2:5] / 3.0).log_softmax(-1).gather(2, triples[..., None]).sum(dim=(1, 2)).exp()
    )
    assert float(exact_27.sum()) == pytest.approx(1.0)
    drawn_27, totals = torch.zeros(27), DraftCounts()
    for seed in range(runs):
        (a, b, c), counts = generate_with_drafts(
            NativeDrafting(model, 6, CPU),
            prompt,
            Sampling(temperature=3.0, seed=seed),
            -1,
            range(3),
        )
        drawn_27[9 * a + 3 * b + c] += 1
        totals.drafted, totals.accepted = (
            totals.drafted + counts.drafted,
            totals.accepted + counts.accepted,
        )
    assert 0.1 < totals.accepted_share < 0.9
    assert abs(excess(drawn_27[None], exact_27[None] * runs)) < 4
    assert excess(drawn_27[None], exact_27.roll(1)[None] * runs) > 20


def test_the_residual_is_the_positive_part_and_never_empty() -> None:
    p_V, q_V = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.7, 0.1])
    assert residual(p_V, q_V) == pytest.approx(torch.tensor([0.3, 0.0, 0.1]))
    assert torch.equal(residual(p_V, p_V), p_V)


def test_a_text_ends_with_its_document_and_within_its_steps() -> None:
    successor = torch.nn.functional.one_hot((torch.arange(10) + 1) % 10, 10) * 50.0
    model = Chain(successor, successor)
    for drafts in (successor, successor.roll(1, dims=1)):
        model.draft_logits_VV = drafts
        assert generate_with_drafts(model, [2], Sampling(greedy=True), 6, range(100))[0] == [
            3,
            4,
            5,
            6,
        ]
        assert generate_with_drafts(model, [2], Sampling(greedy=True), 7, range(100))[0] == [
            3,
            4,
            5,
            6,
            7,
        ]
        for steps in (0, 1, 2, 3):
            assert (
                generate_with_drafts(model, [2], Sampling(greedy=True), -1, range(steps))[0]
                == [3, 4, 5][:steps]
            )


def test_the_longest_text_fits_its_caches() -> None:
    model = tiny_model(
        MULTI_TOKEN, *DENSE, "model.max_position_embeddings=16", "train.sequence_length=16"
    ).eval()
    assert (
        len(
            generate_with_drafts(
                NativeDrafting(model, 16, CPU), [1, 2], Sampling(seed=1), -1, range(14)
            )[0]
        )
        == 14
    )
    with pytest.raises(ConfigError, match="16 positions"):
        NativeDrafting(model, 17, CPU)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="no tokens"):
        generate_with_drafts(chain(), [], Sampling(), 0, range(4))


def test_drafts_with_a_repetition_penalty_are_refused() -> None:
    with pytest.raises(ConfigError, match="--repetition-penalty"):
        generate_with_drafts(chain(), [1], Sampling(repetition_penalty=1.2), 0, range(4))


def test_counts_are_there_while_text_is_written() -> None:
    counts = DraftCounts()
    tokens = speculate(chain(), [0], Sampling(seed=1), counts)
    assert counts.accepted_share == 0.0
    for _ in range(5):
        next(tokens)
    assert counts.drafted >= 2
