"""Every parameter in one group, with the decay of its role; learning rates by role; experts apart
and marked for DeepSpeed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.config.load import load_recipe
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.optim.param_groups import (
    build_optimizer,
    learning_rate_scale,
    parameter_groups,
    parameter_role,
    peak_learning_rates,
)

RATES = ["optimizer.router_learning_rate=1e-4", "optimizer.embedding_learning_rate=2e-4"]
MIXED = [
    "model.vocab_size=100",
    "model.layer_pattern={kind: every_nth, n: 2}",
    "model.intermediate_size=24",
    *RATES,
]
KINDS = {
    "dropless": [*MIXED, "model.moe.num_shared_experts=1"],
    "deepspeed": [*MIXED, "model.moe.kind=deepspeed", "model.moe.drop_tokens=false"],
}


def groups_of(overrides: list[str], ep_size: int = 1) -> tuple[DecoderLM, list[dict[str, Any]]]:
    recipe = load_recipe("debug", overrides)
    with torch.device("meta"):
        model = DecoderLM(recipe.model, ep_size)
    return model, parameter_groups(model, recipe.model, recipe.optimizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", ["false", "true"])
def test_every_parameter_is_in_exactly_one_group(kind: str, tied: str) -> None:
    model, groups = groups_of([*KINDS[kind], f"model.tie_word_embeddings={tied}"])
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_roles_decide_the_decay_and_nothing_moves_before_the_first_step(kind: str) -> None:
    model, groups = groups_of(KINDS[kind])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {"embedding": 0.0, "router": 0.1, "vector": 0.0, "matrix": 0.1}
    by_role: dict[str, set[str]] = {}
    for group in groups:
        assert (group["lr"], group["weight_decay"]) == (0.0, decay[group["role"]])
        by_role.setdefault(group["role"], set()).update(
            names[id(parameter)] for parameter in group["params"]
        )
    assert by_role["embedding"] == {"embedding.weight"}
    assert len(by_role["router"]) == 1 and "layers.1.feed_forward" in next(iter(by_role["router"]))
    assert {name for name in names.values() if "norm" in name} == by_role["vector"]
    assert (
        "head.weight" in by_role["matrix"]
        and "layers.0.feed_forward.down_proj.weight" in by_role["matrix"]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ep_size", [1, 2])
def test_routed_experts_are_marked_with_their_expert_parallel_group(
    kind: str, ep_size: int
) -> None:
    """Unmarked, DeepSpeed would average the gradients of different experts."""
    model, groups = groups_of(KINDS[kind], ep_size)
    marked = [group for group in groups if group.get("moe")]
    assert [(group["name"], group["role"]) for group in marked] == [
        (f"ep_size_{ep_size}", "matrix")
    ]
    routed = {id(p) for name, p in model.named_parameters() if ".experts." in name}
    assert {id(parameter) for parameter in marked[0]["params"]} == routed
    assert len({(group["name"], group["role"]) for group in groups}) == len(groups)


def test_a_frozen_parameter_is_left_out() -> None:
    recipe = load_recipe("debug", ["model.vocab_size=100"])
    model = DecoderLM(recipe.model)
    model.embedding.weight.requires_grad_(False)
    assert "embedding" not in {
        group["role"] for group in parameter_groups(model, recipe.model, recipe.optimizer)
    }


def test_router_and_embedding_may_have_learning_rates_of_their_own() -> None:
    rates = peak_learning_rates(load_recipe("debug", RATES).optimizer)
    assert rates == {"embedding": 2e-4, "router": 1e-4, "vector": 3e-3, "matrix": 3e-3}


def test_a_role_without_a_rate_of_its_own_takes_the_common_one() -> None:
    assert peak_learning_rates(load_recipe("debug").optimizer) == dict.fromkeys(
        ("embedding", "router", "vector", "matrix"), 3e-3
    )


@pytest.mark.parametrize(
    "name,dim,role",
    [
        ("embedding.weight", 2, "embedding"),
        ("layers.0.feed_forward.router.gate.weight", 2, "router"),
        ("layers.0.feed_forward.deepspeed_moe.gate.wg.weight", 2, "router"),
        ("layers.0.feed_forward.gate_proj.weight", 2, "matrix"),
        ("layers.0.feed_forward.experts.w1", 3, "matrix"),
        ("layers.0.attention.q_norm.weight", 1, "vector"),
    ],
)
def test_roles_by_name(name: str, dim: int, role: str) -> None:
    kind = "deepspeed" if "deepspeed_moe" in name else "dropless"
    model = load_recipe("debug", KINDS[kind]).model
    assert parameter_role(name, torch.empty([1] * dim), model) == role


@pytest.mark.parametrize(
    "override,kind,defaults",
    [
        (
            "optimizer={kind: adamw, learning_rate: 1e-2, beta1: 0.8, beta2: 0.9, eps: 1e-6}",
            torch.optim.AdamW,
            {"betas": (0.8, 0.9), "eps": 1e-6},
        ),
        (
            "optimizer={kind: sgd, learning_rate: 1e-2, momentum: 0.5}",
            torch.optim.SGD,
            {"momentum": 0.5},
        ),
    ],
)
def test_the_recipes_numbers_reach_the_optimizer(
    override: str, kind: type, defaults: dict[str, Any]
) -> None:
    config = load_recipe("debug", [override]).optimizer
    optimizer = build_optimizer([{"params": [torch.nn.Parameter(torch.ones(2))]}], config)
    assert type(optimizer) is kind
    assert {name: optimizer.param_groups[0][name] for name in defaults} == defaults


WIDE = (
    "model.initialization={kind: mup, base: {hidden_size: 8, num_attention_heads: 1,"
    " num_key_value_heads: 1, head_dim: 8, intermediate_size: 12, moe_intermediate_size: 8}}"
)


@pytest.mark.parametrize("kind", KINDS)
def test_wide_models_have_groups_by_scale_with_the_same_decay_a_step(kind: str) -> None:
    """Every parameter once, each with the scale it says; learning rate times decay is that of the
    narrow model.
    """
    recipe = load_recipe("debug", [*KINDS[kind], WIDE])
    model = DecoderLM(recipe.model)
    initialize(model, 1)
    groups = parameter_groups(model, recipe.model, recipe.optimizer)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(
        id(p) for p in model.parameters()
    )
    seen = set()
    for group in groups:
        scale = learning_rate_scale(group)
        seen.add((group["role"], scale, bool(group.get("moe"))))
        assert {
            getattr(parameter, "learning_rate_scale", 1.0) for parameter in group["params"]
        } == {scale}
        assert group["weight_decay"] * scale == (
            0.0 if group["role"] in ("embedding", "vector") else 0.1
        )
        assert group.get("moe", False) == all(
            not getattr(parameter, "allreduce", True) for parameter in group["params"]
        )
    assert seen == {
        ("embedding", 1.0, False), ("vector", 1.0, False), ("router", 0.25, False),
        ("matrix", 0.25, False), ("matrix", 0.5, False), ("matrix", 0.25, True),
    }  # fmt: skip


def test_a_standard_models_groups_say_nothing_of_scales() -> None:
    _, groups = groups_of(KINDS["dropless"])
    assert not [group for group in groups if "learning_rate_scale" in group]
