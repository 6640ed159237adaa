"""The softmax top-k router, and the losses and statistics taken from its logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pretrain.model.moe.balance import router_statistics
from pretrain.model.moe.interface import RoutingRecord
from pretrain.model.routers.softmax_topk import SoftmaxTopKRouter
from tests.model.tiny_model import random_tensor

T, D, E = 20, 16, 6


def router_of(top_k: int = 2, norm_topk_prob: bool = True, dtype: torch.dtype = torch.float32) -> SoftmaxTopKRouter:
    gate = nn.Linear(D, E, bias=False, dtype=dtype)
    gate.weight.data = random_tensor(E, D, seed=1, dtype=dtype).detach()
    return SoftmaxTopKRouter(gate, top_k, norm_topk_prob)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_the_largest_probabilities_are_chosen_and_renormalised_on_request(top_k: int, norm_topk_prob: bool) -> None:
    router, x_TD = router_of(top_k, norm_topk_prob), random_tensor(T, D)
    logits_TE, ids_TK, weights_TK = router(x_TD)
    probs_TE = (x_TD @ router.gate.weight.T).softmax(-1)
    for token in range(T):
        best = sorted(range(E), key=lambda expert: -probs_TE[token, expert].item())[:top_k]
        assert ids_TK[token].tolist() == best
        chosen = probs_TE[token, best]
        torch.testing.assert_close(weights_TK[token], chosen / chosen.sum() if norm_topk_prob else chosen)
    torch.testing.assert_close(logits_TE.softmax(-1), probs_TE)


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
    assert (routing.logits_TE - in_bf16).abs().max() > 1e-3  # what a product in bf16 would have lost


def test_a_record_is_written_once_and_then_replayed() -> None:
    router, record, x_TD, other_TD = router_of(), RoutingRecord(), random_tensor(T, D), random_tensor(T, D, seed=9)
    first = router(x_TD, record)
    assert record.topk_ids_TK is not None and torch.equal(record.topk_ids_TK, first.topk_ids_TK)
    replayed, free = router(other_TD, record), router(other_TD)
    assert torch.equal(replayed.topk_ids_TK, first.topk_ids_TK)
    assert not torch.equal(free.topk_ids_TK, first.topk_ids_TK)
    expected = free.logits_TE.softmax(-1).gather(1, first.topk_ids_TK)
    torch.testing.assert_close(replayed.topk_weights_TK, expected / expected.sum(-1, keepdim=True))


def test_losses_and_entropy_by_hand() -> None:
    logits_TE = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # probabilities 3/4, 1/4 and 1/2, 1/2
    found = router_statistics(logits_TE, torch.tensor([2.0, 0.0]), top_k=1, dropped=torch.zeros(()))
    assert found.aux_loss.item() == pytest.approx(2 / 1 * (1.0 * 0.625 + 0.0 * 0.375))
    assert found.z_loss.item() == pytest.approx((math.log(4) ** 2 + math.log(2) ** 2) / 2)
    assert found.entropy.item() == pytest.approx((-0.75 * math.log(0.75) - 0.25 * math.log(0.25) + math.log(2)) / 2)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_balance_loss_is_one_in_balance_and_e_over_k_in_collapse(top_k: int) -> None:
    num_tokens, num_experts = 8, 4
    balanced = router_statistics(torch.zeros(num_tokens, num_experts), torch.full((4,), num_tokens * top_k / 4), top_k, torch.zeros(()))
    assert balanced.aux_loss.item() == pytest.approx(1.0)
    collapsed_logits = torch.zeros(num_tokens, num_experts)
    collapsed_logits[:, top_k:] = -100.0
    counts = torch.tensor([float(num_tokens)] * top_k + [0.0] * (4 - top_k))
    collapsed = router_statistics(collapsed_logits, counts, top_k, torch.zeros(()))
    assert collapsed.aux_loss.item() == pytest.approx(num_experts / top_k)


def test_fractions_of_the_global_batch_replace_those_of_the_micro_batch() -> None:
    logits_TE, counts_E = random_tensor(T, E).detach(), torch.full((E,), 2 * T / E)
    fractions_E = torch.arange(E) / 7.5
    found = router_statistics(logits_TE, counts_E, 2, torch.zeros(()), fractions_E)
    expected = E / 2 * (fractions_E * logits_TE.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(found.aux_loss, expected)
    assert torch.equal(found.counts_E, counts_E)
