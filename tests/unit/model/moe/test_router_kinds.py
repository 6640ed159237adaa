"""Every registered router against its definition in plain loops; groups, noise, and the bias that
balances without a loss.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pretrain.core.registry import kinds_of
from pretrain.model.moe.config import BiasBalancing
from pretrain.model.moe.router import TopKRouter
from pretrain.model.moe.routers import ExpertGroups, NoisyTopK, Router, SigmoidTopK, SoftmaxTopK
from pretrain.training.schedules import balance_update_rate
from tests.support.tiny_model import random_tensor, tiny_config, tiny_model

T, D, E = 40, 16, 8
# One case a router: what it makes of the logits of one token, written without torch's functions.
# A new router adds its line.
SCORES = {
    "softmax_topk": lambda logits: [math.exp(x) / sum(math.exp(y) for y in logits) for x in logits],
    "sigmoid_topk": lambda logits: [1 / (1 + math.exp(-x)) for x in logits],
    "noisy_topk": lambda logits: [
        math.exp(x) / sum(math.exp(y) for y in logits) for x in logits
    ],  # outside training
}
GROUPS = ExpertGroups(num_groups=4, top_k_groups=2)


def router_of(kind: Router, top_k: int = 2, balanced: bool = False) -> TopKRouter:
    gate = nn.Linear(D, E, bias=kind.bias)
    gate.weight.data = random_tensor(E, D, seed=1).detach()
    if kind.bias:
        gate.bias.data = random_tensor(E, seed=2).detach()
    return TopKRouter(kind, gate, top_k, balanced)


def named(kind: str, **fields: object) -> Router:
    return next(
        family
        for family in kinds_of(Router)
        if family.model_fields["kind"].annotation.__args__ == (kind,)
    )(kind=kind, **fields)


def test_every_router_has_a_definition_here() -> None:
    assert {kind.model_fields["kind"].annotation.__args__[0] for kind in kinds_of(Router)} == set(
        SCORES
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bias": True, "norm_topk_prob": False},
        {"routed_scaling_factor": 2.5},
        {"groups": GROUPS},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", SCORES)
def test_choices_and_weights_are_those_of_the_definition(
    kind: str, fields: dict[str, object]
) -> None:
    router, x_TD = router_of(named(kind, **fields), top_k=3).eval(), random_tensor(T, D)
    routing = router(x_TD)
    for token, logits in enumerate(router.gate(x_TD).tolist()):
        scores = SCORES[kind](logits)
        allowed = range(E)
        if "groups" in fields:
            groups = sorted(range(4), key=lambda group: -max(scores[2 * group : 2 * group + 2]))[:2]
            allowed = [expert for expert in range(E) if expert // 2 in groups]
        best = sorted(allowed, key=lambda expert: -scores[expert])[:3]
        assert routing.topk_ids_TK[token].tolist() == best
        weights = [scores[expert] for expert in best]
        total = sum(weights) if fields.get("norm_topk_prob", True) else 1.0
        expected = [fields.get("routed_scaling_factor", 1.0) * weight / total for weight in weights]
        assert routing.topk_weights_TK[token].tolist() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(T))


def test_a_temperature_evens_probabilities_and_changes_no_choice() -> None:
    x_TD = random_tensor(T, D)
    plain, warm = router_of(SoftmaxTopK())(x_TD), router_of(SoftmaxTopK(temperature=2.0))(x_TD)
    assert torch.equal(plain.topk_ids_TK, warm.topk_ids_TK)
    torch.testing.assert_close(warm.probs_TE, (plain.logits_TE / 2).softmax(-1))


def test_groups_are_chosen_by_their_best_or_their_two_best_experts() -> None:
    scores = torch.tensor([[0.9, 0.0, 0.6, 0.5]])
    for score, chosen in (("max", [0, 1]), ("top2_sum", [2, 3])):
        router = router_of(
            SigmoidTopK(
                kind="sigmoid_topk", groups=ExpertGroups(num_groups=2, top_k_groups=1, score=score)
            )
        )
        assert sorted(router._choose(scores)[0].tolist()) == chosen


def test_noise_is_drawn_in_training_only_and_its_size_is_learned() -> None:
    router, x_TD = router_of(NoisyTopK(kind="noisy_topk")), random_tensor(T, D)
    clean = router.eval()(x_TD).logits_TE
    torch.testing.assert_close(clean, router.gate(x_TD))
    torch.manual_seed(3)
    nn.init.zeros_(router.noise.weight)
    difference = router.train()(x_TD).logits_TE - clean
    assert difference.std().item() == pytest.approx(math.log(2), rel=0.2)
    router(x_TD).topk_weights_TK[:, 0].sum().backward()
    assert router.noise.weight.grad.abs().max() > 0
    nn.init.constant_(router.noise.weight, 0.0)
    with torch.no_grad():
        router.noise.weight += 3 * x_TD.mean(0)
    assert (router(x_TD).logits_TE - clean).std() > 1.5 * difference.std()


def test_jitter_moves_the_logits_in_training_only() -> None:
    router, x_TD = router_of(SoftmaxTopK(jitter=0.1)), random_tensor(T, D)
    assert torch.equal(router.eval()(x_TD).logits_TE, router.eval()(x_TD).logits_TE)
    moved = (router.train()(x_TD).logits_TE - router.eval()(x_TD).logits_TE).abs()
    assert 0 < moved.max() < 0.1 * (x_TD.abs() @ router.gate.weight.abs().T).max()


# --- balancing by bias ----------------------------------------------------------------------------


def test_the_bias_chooses_and_leaves_weights_and_probabilities_alone() -> None:
    router, x_TD = (
        router_of(SigmoidTopK(kind="sigmoid_topk", norm_topk_prob=False), top_k=1, balanced=True),
        random_tensor(T, D),
    )
    before = router(x_TD)
    router.balance_bias[5] = 10.0
    after = router(x_TD)
    assert after.topk_ids_TK.unique().tolist() == [5]
    torch.testing.assert_close(after.topk_weights_TK[:, 0], before.logits_TE.sigmoid()[:, 5])
    torch.testing.assert_close(after.probs_TE, before.probs_TE)


def test_the_bias_rises_where_load_is_low_and_stays_of_mean_zero() -> None:
    router = router_of(SoftmaxTopK(), balanced=True)
    router.move_balance_bias(torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1]), 0.01)
    assert router.balance_bias[0] < 0 < router.balance_bias[1]
    assert router.balance_bias.mean().item() == pytest.approx(0, abs=1e-8)
    assert (router.balance_bias[1] - router.balance_bias[0]).item() == pytest.approx(0.02)


def test_the_bias_stays_fp32_and_keeps_updates_that_bf16_would_lose() -> None:
    """2,000 updates of 0.001 stop at 0.5 in a buffer that was cast."""
    model = tiny_model("model.moe.bias_balancing={}").to(torch.bfloat16).half().bfloat16()
    (router,) = [module for module in model.layers[0].modules() if isinstance(module, TopKRouter)]
    assert router.gate.weight.dtype == torch.bfloat16 and router.balance_bias.dtype == torch.float32
    load_E = torch.tensor([0.0, 1.0, 1.0, 0.0])
    for _ in range(2000):
        router.move_balance_bias(load_E, 0.001)
    assert router.balance_bias.tolist() == pytest.approx([2.0, -2.0, -2.0, 2.0], rel=1e-3)
    cast = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(2000):
        cast += 0.001
    assert cast.item() == pytest.approx(0.5, rel=0.01)


def test_a_forward_pass_moves_no_bias_in_training_nor_evaluation() -> None:
    router = router_of(SoftmaxTopK(), balanced=True)
    for mode in (True, False):
        router.train(mode)(random_tensor(T, D))
    assert router.balance_bias.tolist() == [0.0] * E


def test_the_bias_is_part_of_the_models_state() -> None:
    model = tiny_model("model.moe.bias_balancing={}")
    assert "layers.0.feed_forward.router.balance_bias" in model.state_dict()
    assert not any("balance_bias" in name for name in tiny_model().state_dict())


@pytest.mark.parametrize("schedule,half", [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_the_rate_follows_its_schedule_and_freezes(schedule: str, half: float) -> None:
    config = BiasBalancing(update_rate=0.01, schedule=schedule, frozen_share=0.2)
    assert balance_update_rate(0, 100, config) == pytest.approx(0.01)
    assert balance_update_rate(40, 100, config) == pytest.approx(0.01 * half)
    assert balance_update_rate(79, 100, config) > 0
    assert {balance_update_rate(step, 100, config) for step in (80, 99)} == {0.0}


@pytest.mark.parametrize(
    "groups,sentence",
    [
        ("{num_groups: 3, top_k_groups: 1}", "does not divide num_experts"),
        ("{num_groups: 2, top_k_groups: 3}", "only 2 groups"),
        ("{num_groups: 4, top_k_groups: 1}", "hold only 1 experts"),
        ("{num_groups: 4, top_k_groups: 2, score: top2_sum}", "two experts in a group"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups: str, sentence: str) -> None:
    with pytest.raises(Exception, match=sentence):
        tiny_config(f"model.moe.router.groups={groups}")
