"""The contract of every registered kind and option: the same checks for each.

What needs two ranks is in tests/integration/distributed.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

from pretrain.checkpoint.experts import (
    expert_names,
    moe_prefixes,
    read_experts,
    router_names,
    write_experts,
)
from pretrain.core.registry import OneOf
from pretrain.model.config import ModelConfig, Recomputation
from pretrain.model.decoder import DecoderLM
from pretrain.model.moe.config import Role
from tests.support.model_kinds import CASES, FAMILIES, OPTIONS, registered
from tests.support.tiny_model import random_tokens, tiny_config, tiny_model

B, S = 2, 24


def losses_of(model: DecoderLM, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of one training batch and all gradients."""
    tokens = random_tokens(B, S + 1, seed=5)
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss = model.train()(tokens[:, :-1], tokens[:, 1:], float(B * S)).loss
    loss.backward()
    return loss.detach(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_every_family_of_a_model_is_in_the_contract() -> None:
    named = {
        name
        for name, field in ModelConfig.model_fields.items()
        if any(isinstance(mark, OneOf) for mark in field.metadata)
    }
    # moe may be absent, and is marked inside a union with None; how weights start is compared in
    # test_width.py
    assert named - {"initialization"} | {"moe", "moe.router"} == set(FAMILIES)
    assert len(CASES) == len(set(registered())) + len(OPTIONS) > 30


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_finite_gradient_and_the_loss_starts_near_chance(case: str) -> None:
    model = tiny_model(*CASES[case], "model.initializer_range=0.05")
    tokens = random_tokens(B, S + 1, seed=5)
    assert model(tokens[:, :-1], tokens[:, 1:], 1.0).nll.item() / (B * S) == pytest.approx(
        math.log(100), abs=0.5
    )
    _, gradients = losses_of(model)
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


@pytest.mark.parametrize("case", CASES)
def test_the_same_seed_gives_the_same_bits(case: str) -> None:
    (first, gradients), (second, others) = (losses_of(tiny_model(*CASES[case])) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("form", ["selective", "full"])
@pytest.mark.parametrize("case", CASES)
def test_recomputed_blocks_change_no_bit(case: str, form: Recomputation) -> None:
    kept, gradients = losses_of(tiny_model(*CASES[case]))
    recomputed, others = losses_of(tiny_model(*CASES[case], activation_checkpointing=form))
    assert torch.equal(kept, recomputed)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_cached_logits_equal_the_full_forward_pass(case: str) -> None:
    model, tokens = tiny_model(*CASES[case]).eval(), random_tokens(B, S)
    with torch.no_grad():
        full = model.logits(tokens)
        cache = model.new_cache(B, S, "cpu", torch.float32)
        parts = [model.logits(part, cache=cache) for part in tokens.split((7, 1, 1, S - 9), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_no_logit_depends_on_a_later_token(case: str) -> None:
    model, tokens = tiny_model(*CASES[case]).eval(), random_tokens(B, S)
    changed = tokens.clone()
    changed[:, S // 2] = (changed[:, S // 2] + 1) % 100
    with torch.no_grad():
        before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, : S // 2], after[:, : S // 2], atol=1e-5, rtol=1e-5)
    assert (before[:, S // 2 :] - after[:, S // 2 :]).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_bf16_computes_nearly_the_same_logits(case: str) -> None:
    """A choice between two close experts may flip, so the bound is on the norm, not each logit."""
    model, tokens = (
        tiny_model(*CASES[case], "model.initializer_range=0.1").eval(),
        random_tokens(B, S),
    )
    with torch.no_grad():
        full, low = model.logits(tokens), copy.deepcopy(model).to(torch.bfloat16).logits(tokens)
    assert low.dtype == torch.float32
    assert ((full - low).norm() / full.norm()).item() < 0.12


@pytest.mark.parametrize("case", CASES)
def test_the_meta_device_builds_the_same_shapes(case: str) -> None:
    with torch.device("meta"):
        shapes = {
            name: parameter.shape
            for name, parameter in DecoderLM(tiny_config(*CASES[case])).named_parameters()
        }
    assert shapes == {
        name: parameter.shape for name, parameter in tiny_model(*CASES[case]).named_parameters()
    }


@pytest.mark.parametrize("case", CASES)
def test_a_kind_of_moe_layer_knows_each_of_its_tensors(case: str) -> None:
    """A tensor without a role would be decayed, frozen and counted as a dense feed-forward's."""
    model = tiny_model(*CASES[case])
    config, tensors = model.config, model.state_dict()
    in_moe = {
        name for prefix in moe_prefixes(config) for name in tensors if name.startswith(f"{prefix}.")
    }
    assert {name for name in tensors if config.moe_role(name) is None} == tensors.keys() - in_moe
    if config.routing is None:
        return
    for prefix in moe_prefixes(config):
        experts, router = expert_names(prefix, config), router_names(prefix, config.routing)
        roles = {name: config.moe_role(name) for name in in_moe if name.startswith(f"{prefix}.")}
        assert set(experts) == {
            name for name, role in roles.items() if role in (Role.EXPERT, Role.EXPERT_BIAS)
        }
        assert set(router) == {name for name, role in roles.items() if role is Role.ROUTER}
        assert all(len(tensors[name]) == config.routing.num_experts for name in router)
        again = write_experts(read_experts(tensors, prefix, config), prefix, config)
        assert again.keys() == set(experts)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in again.items())
