"""muP: nothing changes at the base; at other widths each parameter is scaled by its role, and
training is that of the form with explicit factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.model.moe.router import TopKRouter
from pretrain.model.mup import WidthScale, width_scales
from pretrain.optim.param_groups import (
    build_optimizer,
    learning_rate_scale,
    parameter_groups,
    peak_learning_rates,
)

# The debug recipe: D 32, N 4, M 2, H 8, experts of 32; the wide model below is four times as wide
# with heads four times as large.
BASE = (
    "model.initialization={kind: mup, base: {hidden_size: 32, num_attention_heads: 4,"
    " num_key_value_heads: 2, moe_intermediate_size: 32}}"
)
WIDE = (
    BASE,
    "model.initialization.base.head_dim=8",
    "model.hidden_size=128",
    "model.attention.head_dim=32",
    "model.moe.moe_intermediate_size=64",
)
HIDDEN, OUTPUT, DOWN = WidthScale(0.5, 0.25), WidthScale(0.25, 0.25), WidthScale(0.5**0.5, 0.5)


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe("debug", ["model.vocab_size=100", "train.grad_clip=0", *overrides])


def built(recipe: Recipe, seed: int = 1) -> DecoderLM:
    model = DecoderLM(recipe.model)
    initialize(model, seed)
    return model


def short(scales: dict[str, WidthScale], layer: str = "layers.1.") -> dict[str, WidthScale]:
    kept = {
        name.removeprefix(layer): scale
        for name, scale in scales.items()
        if name.startswith(layer) or not name.startswith("layers.")
    }
    return {
        name.removesuffix(".weight").removeprefix("feed_forward."): scale
        for name, scale in kept.items()
    }


def test_at_the_base_widths_every_weight_and_rate_is_that_of_the_standard_kind() -> None:
    standard, mup = built(recipe_of()), built(recipe_of(BASE))
    assert width_scales(mup.config) == {}
    for name, parameter in mup.named_parameters():
        assert torch.equal(parameter, standard.get_parameter(name)) and not hasattr(
            parameter, "learning_rate_scale"
        ), name


def test_each_parameter_is_scaled_by_its_role() -> None:
    attention = dict.fromkeys((f"attention.{name}_proj" for name in "qkvo"), HIDDEN)
    assert short(width_scales(recipe_of(*WIDE).model)) == {
        **attention, "attention.q_norm": WidthScale(0.5, 0.5), "router.gate": OUTPUT,
        "experts.w1": HIDDEN, "experts.w3": HIDDEN, "experts.w2": DOWN, "head": OUTPUT,
    }  # fmt: skip


def test_queries_without_a_norm_carry_the_scale_of_scores_themselves() -> None:
    scales = width_scales(
        recipe_of(*WIDE, "model.attention.qk_norm=none", "model.attention.bias=qkv").model
    )
    assert scales["layers.0.attention.q_proj.weight"] == WidthScale(0.25, 0.125)
    assert scales["layers.0.attention.q_proj.bias"] == WidthScale(0.5, 0.5)
    assert "layers.0.attention.k_proj.bias" not in scales


@pytest.mark.parametrize("override", ["model.tie_word_embeddings=true", "model.embedding_size=16"])
def test_a_tied_or_factorised_head_leaves_its_scale_to_the_final_norm(override: str) -> None:
    scales = width_scales(recipe_of(*WIDE, override).model)
    assert scales["final_norm.weight"] == OUTPUT
    assert not [name for name in scales if name.startswith(("head.", "embedding."))]


def test_experts_of_every_kind_of_layer_shared_dense_and_latent_parts_are_known() -> None:
    native = (
        "model.moe.kind=deepspeed",
        "model.moe.drop_tokens=false",
        "model.moe.use_residual=true",
        "model.moe.num_shared_experts=1",
    )
    scales = short(width_scales(recipe_of(*WIDE, *native).model))
    first = "deepspeed_moe.experts.deepspeed_experts.0."
    assert scales["deepspeed_moe.gate.wg"] == scales["coefficient"] == OUTPUT
    for prefix in (first, "mlp.", "shared.feed_forward."):
        assert scales[f"{prefix}gate_proj"] == HIDDEN and scales[f"{prefix}down_proj"] == DOWN
    model = built(recipe_of(*WIDE, *native))
    experts = [
        p
        for name, p in model.named_parameters()
        if ".deepspeed_experts." in name and name.endswith("up_proj.weight")
    ]
    assert len(experts) == 8 and {parameter.learning_rate_scale for parameter in experts} == {0.25}
    latent = (
        "model.attention={kind: mla, num_attention_heads: 4, kv_lora_rank: 12, qk_rope_head_dim: 4,"
        " qk_nope_head_dim: 8, v_head_dim: 6}"
    )
    base = [
        (
            "model.initialization={kind: mup, base: {hidden_size: 8, num_attention_heads: 2,"
            " moe_intermediate_size: 8}}"
        ),
        latent,
    ]
    scales = short(width_scales(recipe_of(*base).model))
    assert (
        scales["attention.q_proj"] == HIDDEN
        and scales["attention.kv_a_proj"] == OUTPUT
        and scales["attention.o_proj"] == DOWN
    )
    assert "attention.kv_b_proj" not in scales


def test_random_weights_have_the_size_that_the_width_asks_for() -> None:
    plain, wide = (
        built(recipe_of(*WIDE, "model.initialization={kind: standard}")),
        built(recipe_of(*WIDE)),
    )
    for name, scale in width_scales(wide.config).items():
        assert torch.equal(wide.get_parameter(name), plain.get_parameter(name) * scale.size), name


def test_a_finished_model_computes_the_same_whatever_its_initialisation_was() -> None:
    ids = torch.arange(40).view(2, 20)
    wide, plain = (
        built(recipe_of(*WIDE)).eval(),
        built(recipe_of(*WIDE, "model.initialization={kind: standard}")).eval(),
    )
    assert not torch.equal(wide.logits(ids), plain.logits(ids))
    plain.load_state_dict(wide.state_dict())
    assert torch.equal(wide.logits(ids), plain.logits(ids))


# --- the form with factors in front of logits, routers and scores (Yang et al. 2022, table 8) -----


def with_factors(recipe: Recipe, logits: float, scores: float) -> DecoderLM:
    """The standard model at the same width, with explicit factors and with weights that have none
    of them inside.
    """
    mup, model = built(recipe), DecoderLM(recipe.model)
    scales = width_scales(recipe.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight, scale = mup.get_parameter(name), scales.get(name, WidthScale(1.0, 1.0))
            parameter.copy_(
                weight
                / (
                    scale.size / 0.5
                    if is_hidden(name) and scale.size == 0.25
                    else 1.0
                    if is_hidden(name)
                    else scale.size
                )
            )
    normed = model._normed
    model._normed = lambda x: logits * normed(x)
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * logits, *inputs[1:]))
    for block in model.layers:
        block.attention.kernel = scaled(block.attention.kernel, scores)
    return model


def scaled(kernel: Callable[..., torch.Tensor], factor: float) -> Callable[..., torch.Tensor]:
    def attend(q: Any, k: Any, v: Any, scores: Any) -> torch.Tensor:
        return kernel(q, k, v, dataclasses.replace(scores, scale=scores.scale * factor))

    return attend


def is_hidden(name: str) -> bool:
    return name.endswith(("_proj.weight", ".w1", ".w2", ".w3"))


def losses(
    recipe: Recipe, model: DecoderLM, rate: Callable[[str], float] | None = None
) -> list[float]:
    """Of six steps on the same tokens.

    ``rate`` gives each parameter's part of the learning rate by hand.
    """
    groups = parameter_groups(model, recipe.model, recipe.optimizer)
    if rate is not None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = [
            {**g, "params": [p], "learning_rate_scale": rate(names[id(p)])}
            for g in groups
            for p in g["params"]
        ]
        groups = [
            {**g, "weight_decay": g["weight_decay"] / g["learning_rate_scale"]} for g in groups
        ]
    optimizer, peaks = (
        build_optimizer(groups, recipe.optimizer),
        peak_learning_rates(recipe.optimizer),
    )
    tokens, found = torch.randint(0, 100, (4, 33), generator=torch.Generator().manual_seed(3)), []
    for _ in range(6):
        for group in optimizer.param_groups:
            group["lr"] = peaks[group["role"]] * learning_rate_scale(group)
        optimizer.zero_grad()
        output = model(tokens[:, :-1], tokens[:, 1:], 128.0)
        output.loss.backward()
        optimizer.step()
        found.append(output.loss.item())
    return found


EXACT = ("optimizer.eps=1e-14", "model.initializer_range=0.1")


@pytest.mark.parametrize(
    "head", ["model.tie_word_embeddings=false", "model.tie_word_embeddings=true"]
)
@pytest.mark.parametrize("norm", ["none", "head"])
def test_training_is_that_of_the_form_with_explicit_factors(head: str, norm: str) -> None:
    recipe = recipe_of(*WIDE, *EXACT, head, f"model.attention.qk_norm={norm}")
    expected = losses(recipe, with_factors(recipe, logits=0.25, scores=0.5), rate)
    assert losses(recipe, built(recipe)) == pytest.approx(expected, rel=2e-6)
    assert expected[-1] < expected[0] - 0.1


def rate(name: str) -> float:
    """Table 8: only hidden matrices have a learning rate of their own."""
    return 1.0 if not is_hidden(name) else 0.5 if name.endswith(".w2") else 0.25


@pytest.mark.parametrize("logits,scores", [(1.0, 0.5), (0.25, 1.0)])
def test_without_one_of_the_factors_training_is_another_one(logits: float, scores: float) -> None:
    recipe = recipe_of(*WIDE, *EXACT)
    wrong = losses(recipe, with_factors(recipe, logits, scores), rate)
    assert losses(recipe, built(recipe)) != pytest.approx(wrong, rel=1e-4)
