from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.export.megatron.arguments import (
    arguments_of,
    options_of,
    reasons_against_megatron,
    refuse_unless_expressible,
)
from pretrain.export.megatron.blocks import Layout
from pretrain.export.megatron.recipe import recipe_of as recipe_of_arguments
from tests.support.random_checkpoint import VOCAB_SIZE, recipe_of

GROUPS = "model.moe.router={kind: sigmoid_topk, groups: {num_groups: 2, top_k_groups: 1"
# name: overrides of debug, and what the refusal names.
REFUSED: dict[str, tuple[list[str], str]] = {
    "a window": (["model.attention.sliding_window=8"], "model.attention.sliding_window is 8"),
    "sinks": (["model.attention.sinks=true"], "model.attention.sinks is true"),
    "a norm over all heads": (["model.attention.qk_norm=full"], "model.attention.qk_norm is full"),
    "biases of the output": (["model.attention.bias=all"], "model.attention.bias is all"),
    "another activation": (["model.feed_forward.kind=gelu"], "model.feed_forward.kind is gelu"),
    "norms behind": (["model.norm_position=post"], "model.norm_position is post"),
    "ALiBi": (["model.position={kind: alibi}"], "model.position.kind is alibi"),
    "yarn without latents": (
        ["model.position={kind: yarn, factor: 4, original_max_position_embeddings: 16}"],
        "model.position.kind is yarn",
    ),
    "another llama3": (
        ["model.position={kind: llama3, factor: 8, original_max_position_embeddings: 32}"],
        "model.position.original_max_position_embeddings is 32",
    ),
    "a bias of the router": (["model.moe.router.bias=true"], "model.moe.router.bias is true"),
    "a temperature": (["model.moe.router.temperature=2"], "model.moe.router.temperature is 2.0"),
    "balancing softmax by a bias": (["model.moe.bias_balancing={}"], "model.moe.bias_balancing"),
    "sigmoid scores as they are": (
        ["model.moe.router={kind: sigmoid_topk, norm_topk_prob: false}"],
        "model.moe.router.norm_topk_prob is false",
    ),
    "groups by their best": ([f"{GROUPS}, score: max}}}}"], "model.moe.router.groups.score is max"),
    "a gate of shared experts": (
        ["model.moe.num_shared_experts=1", "model.moe.shared_expert_gate=true"],
        "model.moe.shared_expert_gate is true",
    ),
    "dropped tokens": (
        ["model.moe.kind=deepspeed", "model.moe.gate=router", "model.moe.drop_tokens=true"],
        "model.moe.drop_tokens is true",
    ),
    "a bias of the head": (["model.head_bias=true"], "model.head_bias is true"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatrons_arguments_cannot_say_is_refused_by_its_field(name: str) -> None:
    overrides, field = REFUSED[name]
    recipe = recipe_of("debug", *overrides)
    with pytest.raises(ConfigError, match="cannot be said in Megatron's arguments") as refused:
        refuse_unless_expressible(recipe.model, recipe.name)
    assert field in str(refused.value)
    assert not reasons_against_megatron(recipe_of("debug").model)


def test_groups_by_their_two_best_are_megatrons_if_top_k_is_twice_as_many_as_groups() -> None:
    groups = f"{GROUPS}, score: top2_sum}}}}"
    assert not reasons_against_megatron(recipe_of("debug", groups).model)
    three = recipe_of("debug", "model.moe.num_experts=8", "model.moe.top_k=3", groups)
    (reason,) = reasons_against_megatron(three.model)
    assert "top_k // top_k_groups = 3 best" in reason


def test_options_are_the_arguments_without_defaults_of_switches() -> None:
    recipe = recipe_of("deepseek_v3_mini", "model.moe.router.groups.top_k_groups=2")
    options = options_of(arguments_of(recipe.model))
    assert {
        "--num-layers=5",
        "--moe-layer-freq=[0,0,0,1,1]",
        "--disable-bias-linear",
        "--untie-embeddings-and-output-weights",
        "--multi-latent-attention",
        "--moe-router-enable-expert-bias",
        "--moe-router-group-topk=2",
    } <= set(options)
    assert not [each for each in options if "None" in each or "use-rope-scaling" in each]


def test_layers_of_one_kind_are_stacked_and_layers_of_two_are_tensors_of_their_own() -> None:
    stacked = {block.key for block in Layout(recipe_of("debug").model).blocks()}
    assert "decoder.layers.mlp.experts.experts.linear_fc1.weight" in stacked
    mixed = recipe_of(
        "debug", "model.layer_pattern={kind: first_k_dense, k: 1}", "model.intermediate_size=48"
    )
    keys = {block.key for block in Layout(mixed.model).blocks()}
    assert "decoder.layers.0.mlp.linear_fc1.weight" in keys
    assert "decoder.layers.1.mlp.experts.experts.linear_fc1.weight" in keys
    assert not keys & (stacked - {"embedding.word_embeddings.weight", "output_layer.weight"}) - {
        "decoder.final_layernorm.weight"
    }


def imported(tmp_path: Path, **changed: Any) -> Any:
    arguments = arguments_of(recipe_of("debug").model) | changed
    return recipe_of_arguments(
        tmp_path, tmp_path / "out", arguments, tmp_path / "common.pt", VOCAB_SIZE + 84
    ).model


def test_arguments_of_other_versions_and_of_other_losses_are_read(tmp_path: Path) -> None:
    older = {"norm_epsilon": 1e-5, "moe_layer_freq": 1, "group_query_attention": False}
    model = imported(tmp_path, **older)
    assert model.norm.eps == 1e-5 and model.attention.num_key_value_heads == 4
    losses = {
        "moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.2],
    }
    moe = imported(tmp_path, **losses).moe
    assert (moe.sequence_loss_weight, moe.aux_loss_weight) == (0.1, 0.2)
    assert moe.balance_scope == "global_batch"
    wide = imported(tmp_path, moe_shared_expert_intermediate_size=40).moe
    assert (wide.num_shared_experts, wide.shared_width) == (1, 40)
    # A NullTokenizer adds the end of a document.
    null = imported(tmp_path, vocab_size=299, tokenizer_type="NullTokenizer")
    assert null.vocab_size == 300


def test_arguments_that_change_nothing_are_no_reason_to_refuse(tmp_path: Path) -> None:
    same = {"moe_router_topk_scaling_factor": 1.0, "moe_router_num_groups": 2, "rope_type": None}
    assert imported(tmp_path, **same) == imported(tmp_path)
    # Megatron's own command lines of DeepSeek-V3.
    sigmoid = {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": True}
    assert imported(tmp_path, **sigmoid).moe.router.kind == "sigmoid_topk"


@pytest.mark.parametrize(
    "argument,value",
    [
        ("normalization", "LayerNorm"),
        ("add_bias_linear", True),
        ("position_embedding_type", "learned_absolute"),
        ("rotary_percent", 0.5),
        ("window_size", (128, 0)),
        ("moe_expert_capacity_factor", 1.0),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("apply_layernorm_1p", True),
        ("moe_latent_size", 16),
    ],
)
def test_arguments_that_no_recipe_can_say_are_refused_by_name(
    tmp_path: Path, argument: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=rf"says {argument} = .*cannot be converted"):
        imported(tmp_path, **{argument: value})


def test_arguments_that_describe_no_model_are_a_damaged_checkpoint(tmp_path: Path) -> None:
    for changed in ({"hidden_size": None}, {"moe_layer_freq": [1]}, {"num_attention_heads": "4"}):
        with pytest.raises((CheckpointError, ConfigError)):
            imported(tmp_path, **changed)
