"""The gradient of the language loss in a router for every kind of choice, and the warning if it has
none.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from pretrain.config.load import load_recipe
from pretrain.config.rules.routers import deaf_router, router_warnings
from pretrain.config.rules.sections import warnings_about
from pretrain.core.shipped import recipe_names
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.model.moe.losses import LOSSES
from tests.support.tiny_model import random_tokens, tiny_config

PEER = (
    "model.moe={kind: peer, product_key_sizes: [4, 4], query_dim: 8, num_heads: 2,"
    " moe_intermediate_size: 4, top_k: %d}"
)
NATIVE = ("model.moe.kind=deepspeed", "model.moe.causal=false")
ROUTED = ("model.moe.kind=deepspeed", "model.moe.gate=router")
ONE, NORMED = "model.moe.top_k=1", "model.moe.router.norm_topk_prob=true"
SIGMOID, NOISY = "model.moe.router.kind=sigmoid_topk", "model.moe.router.kind=noisy_topk"
GATED = ("model.moe.num_shared_experts=1", "model.moe.shared_expert_gate=true")
EACH_ALONE = "model.moe.router.groups={num_groups: 4, top_k_groups: 2}"
# Overrides, and whether the language loss has a gradient for the router.
CASES: dict[str, tuple[tuple[str, ...], bool]] = {
    "two choices": ((), True),
    "two choices as they are": (("model.moe.router.norm_topk_prob=false",), True),
    "one choice": ((ONE,), True),
    "one choice divided by itself": ((ONE, NORMED), False),
    "one choice divided by itself, scaled": (
        (ONE, NORMED, "model.moe.router.routed_scaling_factor=2.5"),
        False,
    ),
    "one choice divided by itself, shared experts with a gate": ((ONE, NORMED, *GATED), False),
    "one sigmoid choice": ((ONE, SIGMOID), True),
    "one sigmoid choice divided by itself": ((ONE, SIGMOID, NORMED), False),
    "one noisy choice": ((ONE, NOISY), True),
    "one noisy choice divided by itself": ((ONE, NOISY, NORMED), False),
    "one choice in DeepSpeed's layer": ((*ROUTED, ONE), True),
    "one choice divided by itself in DeepSpeed's layer": ((*ROUTED, ONE, NORMED), False),
    "DeepSpeed's own gate, one choice": ((*NATIVE, ONE), True),
    "DeepSpeed's own gate, two choices": (NATIVE, True),
    "DeepSpeed's own gate, three choices": ((*NATIVE, "model.moe.top_k=3"), True),
    "hardly any room": (
        (*ROUTED, "model.moe.capacity_factor=0.01", "model.moe.min_capacity=0"),
        True,
    ),
    "a residual expert": ((*ROUTED, ONE, NORMED, "model.moe.use_residual=true"), False),
    "all experts": (("model.moe.top_k=4",), True),
    "groups of one expert": ((EACH_ALONE,), True),
    "one of the groups of one expert": (
        (ONE, "model.moe.router.groups={num_groups: 4, top_k_groups: 1}"),
        True,
    ),
    "one of the groups of one expert, divided by itself": (
        (ONE, NORMED, "model.moe.router.groups={num_groups: 4, top_k_groups: 1}"),
        False,
    ),
    "a low temperature": (("model.moe.router.temperature=0.1",), True),
    "product keys, two choices": ((PEER % 2,), True),
    "product keys, one choice": ((PEER % 1,), False),
}


def router_gradients(config: ModelConfig) -> dict[str, float]:
    """The norm of the language loss' gradient for each tensor that chooses experts."""
    torch.manual_seed(0)
    model = DecoderLM(config).train()
    initialize(model, seed=1)
    input_ids_BS = random_tokens(2, 33)
    functional.cross_entropy(
        model.logits(input_ids_BS[:, :-1]).flatten(0, 1), input_ids_BS[:, 1:].flatten()
    ).backward()
    parts = ("router.gate.", "gate.wg.", "retrieval.")
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(part in name for part in parts)
    }
    return {
        name: 0.0 if parameter.grad is None else float(parameter.grad.norm())
        for name, parameter in chosen.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_a_router_without_gradient_is_named(case: str) -> None:
    overrides, learns = CASES[case]
    config = tiny_config(*overrides)
    gradients = router_gradients(config)
    assert gradients
    if learns:
        assert min(gradients.values()) > 1e-4, gradients
    else:
        assert max(gradients.values()) < 1e-6, gradients
    assert config.moe is not None and config.moe.router_learns == learns
    assert (deaf_router(config) is None) == learns


@pytest.mark.parametrize("kind", ["softmax_topk", "sigmoid_topk", "noisy_topk"])
def test_one_choice_keeps_its_score_unless_a_recipe_says_otherwise(kind: str) -> None:
    chosen = [f"model.moe.router.kind={kind}"]
    default, said, normed = (
        load_recipe("debug", [*chosen, *more])
        for more in ([ONE], [ONE, "model.moe.router.norm_topk_prob=false"], [ONE, NORMED])
    )
    routers = [recipe.model.moe.router for recipe in (default, said, normed)]
    assert [router.norm_topk_prob for router in routers] == [False, False, True]
    assert load_recipe("debug", chosen).model.moe.router.norm_topk_prob is True
    sentences = [warnings_about(recipe) for recipe in (default, said, normed)]
    assert "is false because top_k is 1" in sentences[0][0] and sentences[1] == []
    assert "learn nothing from the language loss" in sentences[2][0]


def test_all_experts_have_nothing_to_balance() -> None:
    """E / k * sum f p is E / k * k / E = 1, whatever the router says."""
    config = tiny_config("model.moe.top_k=4", "model.moe.sequence_loss_weight=0.1")
    (sentence,) = router_warnings(config)
    assert "aux_loss_weight and sequence_loss_weight have nothing to balance" in sentence
    model = DecoderLM(config).train()
    initialize(model, seed=1)
    ids_BS = random_tokens(2, 33)
    routed = model(ids_BS[:, :-1], ids_BS[:, 1:], 64.0).router
    for loss in ("aux_loss", "sequence_loss"):
        torch.testing.assert_close(routed.losses_LJ[:, list(LOSSES).index(loss)], torch.ones(2))
    assert router_warnings(tiny_config("model.moe.top_k=4", "model.moe.aux_loss_weight=0")) == []
    assert router_warnings(tiny_config("model.moe.top_k=3")) == []


@pytest.mark.parametrize("name", recipe_names())
def test_no_shipped_recipe_has_a_router_that_learns_nothing(name: str) -> None:
    assert router_warnings(load_recipe(name).model) == []
