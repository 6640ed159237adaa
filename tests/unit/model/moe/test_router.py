"""The softmax top-k router, and the losses and statistics taken from a decision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.model.moe.base import RoutingRecord
from pretrain.model.moe.config import DroplessMoEConfig
from pretrain.model.moe.losses import LOSSES, router_statistics
from pretrain.model.moe.router import Routing, TopKRouter
from pretrain.model.moe.routers import SoftmaxTopK
from tests.support.tiny_model import random_tensor

T, D, E = 20, 16, 6


def router_of(
    top_k: int = 2, norm_topk_prob: bool = True, dtype: torch.dtype = torch.float32
) -> TopKRouter:
    gate = nn.Linear(D, E, bias=False, dtype=dtype)
    gate.weight.data = random_tensor(E, D, seed=1, dtype=dtype).detach()
    return TopKRouter(
        SoftmaxTopK(norm_topk_prob=norm_topk_prob), gate, top_k, balanced_by_bias=False
    )


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_the_largest_probabilities_are_chosen_and_renormalised_on_request(
    top_k: int, norm_topk_prob: bool
) -> None:
    router, x_TD = router_of(top_k, norm_topk_prob), random_tensor(T, D)
    logits_TE, routed_probs_TE, ids_TK, weights_TK = router(x_TD)[:4]
    probs_TE = (x_TD @ router.gate.weight.T).softmax(-1)
    for token in range(T):
        best = sorted(range(E), key=lambda expert: -probs_TE[token, expert].item())[:top_k]
        assert ids_TK[token].tolist() == best
        chosen = probs_TE[token, best]
        torch.testing.assert_close(
            weights_TK[token], chosen / chosen.sum() if norm_topk_prob else chosen
        )
    torch.testing.assert_close(logits_TE.softmax(-1), probs_TE)
    torch.testing.assert_close(routed_probs_TE, probs_TE)


def test_weights_carry_gradients_to_the_gate() -> None:
    router = router_of()
    router(random_tensor(T, D)).topk_weights_TK[:, 0].sum().backward()
    assert router.gate.weight.grad is not None and router.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("autocast", [False, True])
def test_routing_is_computed_in_fp32_in_a_bf16_model(autocast: bool) -> None:
    router, x_TD = router_of(dtype=torch.bfloat16), random_tensor(T, D, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = router(x_TD)
    assert routing.logits_TE.dtype == routing.topk_weights_TK.dtype == torch.float32
    torch.testing.assert_close(routing.logits_TE, x_TD.float() @ router.gate.weight.float().T)
    in_bf16 = (x_TD @ router.gate.weight.T).float()
    assert (
        routing.logits_TE - in_bf16
    ).abs().max() > 1e-3  # what a product in bf16 would have lost


def test_a_record_is_written_once_and_then_replayed() -> None:
    router, record, x_TD, other_TD = (
        router_of(),
        RoutingRecord(),
        random_tensor(T, D),
        random_tensor(T, D, seed=9),
    )
    first = router(x_TD, record)
    assert record.topk_ids_TK is not None and torch.equal(record.topk_ids_TK, first.topk_ids_TK)
    replayed, free = router(other_TD, record), router(other_TD)
    assert torch.equal(replayed.topk_ids_TK, first.topk_ids_TK)
    assert not torch.equal(free.topk_ids_TK, first.topk_ids_TK)
    expected = free.logits_TE.softmax(-1).gather(1, first.topk_ids_TK)
    torch.testing.assert_close(replayed.topk_weights_TK, expected / expected.sum(-1, keepdim=True))


def statistics_of(
    logits_TE: torch.Tensor,
    top_k: int,
    counts_E: torch.Tensor,
    fractions_E: torch.Tensor | None = None,
    **weights: float,
) -> Any:
    """Losses by name, entropy and counts of the k largest probabilities of ``logits_TE`` in two
    sequences.
    """
    config = DroplessMoEConfig(
        num_experts=logits_TE.shape[1],
        top_k=top_k,
        moe_intermediate_size=1,
        **{f"{name}_weight": 1.0 for name in weights},
    )
    probs_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = probs_TE.topk(top_k, dim=-1)
    found = router_statistics(
        config,
        Routing(logits_TE, probs_TE, ids_TK, weights_TK),
        counts_E,
        2,
        torch.zeros(()),
        fractions_E,
    )
    return found, dict(zip(LOSSES, found.losses_J, strict=True))


def test_losses_and_entropy_by_hand() -> None:
    logits_TE = torch.tensor(
        [[math.log(3.0), 0.0], [0.0, 0.0]]
    )  # probabilities 3/4, 1/4 and 1/2, 1/2
    found, losses = statistics_of(
        logits_TE, 1, torch.tensor([2.0, 0.0]), sequence_loss=1, cv_loss=1, entropy_loss=1
    )
    assert losses["aux_loss"].item() == pytest.approx(2 / 1 * (1.0 * 0.625 + 0.0 * 0.375))
    assert losses["z_loss"].item() == pytest.approx((math.log(4) ** 2 + math.log(2) ** 2) / 2)
    assert losses["sequence_loss"].item() == pytest.approx((2 * 0.75 + 2 * 0.5) / 2)
    assert losses["cv_loss"].item() == pytest.approx(
        1.0
    )  # all weight on one of two experts: variance = mean^2
    assert losses["entropy_loss"].item() == pytest.approx(
        math.log(2) + 0.625 * math.log(0.625) + 0.375 * math.log(0.375), rel=1e-4
    )
    assert found.entropy.item() == pytest.approx(
        (-0.75 * math.log(0.75) - 0.25 * math.log(0.25) + math.log(2)) / 2
    )


def test_losses_without_weight_are_not_computed_but_the_two_that_are_looked_at() -> None:
    _, losses = statistics_of(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 1, torch.tensor([2.0, 0.0]))
    assert [name for name, value in losses.items() if value.item()] == ["aux_loss", "z_loss"]


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_balance_loss_is_one_in_balance_and_e_over_k_in_collapse(top_k: int) -> None:
    num_tokens, num_experts = 8, 4
    _, balanced = statistics_of(
        torch.zeros(num_tokens, num_experts), top_k, torch.full((4,), num_tokens * top_k / 4)
    )
    assert balanced["aux_loss"].item() == pytest.approx(1.0)
    collapsed_logits = torch.zeros(num_tokens, num_experts)
    collapsed_logits[:, top_k:] = -100.0
    counts = torch.tensor([float(num_tokens)] * top_k + [0.0] * (4 - top_k))
    _, collapsed = statistics_of(collapsed_logits, top_k, counts, sequence_loss=1)
    assert collapsed["aux_loss"].item() == pytest.approx(num_experts / top_k)
    assert collapsed["sequence_loss"].item() == pytest.approx(num_experts / top_k)


def test_the_sequence_loss_sees_what_the_mean_over_sequences_hides() -> None:
    """Each sequence goes to a different expert: balanced as a batch, collapsed as a sequence."""
    logits_TE = torch.tensor([[9.0, 0.0]] * 4 + [[0.0, 9.0]] * 4)
    _, losses = statistics_of(logits_TE, 1, torch.tensor([4.0, 4.0]), sequence_loss=1)
    assert losses["aux_loss"].item() == pytest.approx(1.0)
    assert losses["sequence_loss"].item() == pytest.approx(2.0, abs=1e-3)


def test_the_entropy_loss_raises_the_entropy_of_the_choices() -> None:
    """H64LM adds +entropy to its loss, which lowers diversity: a step down ours must raise it."""
    logits_TE = (random_tensor(T, E) * 2).detach().requires_grad_()

    def entropy() -> torch.Tensor:
        mean_E = logits_TE.softmax(-1).mean(0)
        return -(mean_E * mean_E.log()).sum()

    before = entropy().item()
    for _ in range(20):
        _, losses = statistics_of(logits_TE, 2, torch.ones(E), entropy_loss=1)
        (gradient,) = torch.autograd.grad(losses["entropy_loss"], logits_TE)
        logits_TE = (logits_TE - 5.0 * gradient).detach().requires_grad_()
    assert entropy().item() > before + 0.01


def test_fractions_of_the_global_batch_replace_those_of_the_micro_batch() -> None:
    logits_TE, counts_E = random_tensor(T, E).detach(), torch.full((E,), 2 * T / E)
    fractions_E = torch.arange(E) / 7.5
    found, losses = statistics_of(logits_TE, 2, counts_E, fractions_E)
    expected = E / 2 * (fractions_E * logits_TE.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(losses["aux_loss"], expected)
    assert torch.equal(found.counts_E, counts_E)
