"""What goes into an export of the target ``custom``, what is refused, and that nothing in it is
there for show.
"""

from __future__ import annotations

import ast
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.tokenizer.config import TrainBPE
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tokenizer.training import train_bpe
from pretrain.config.load import load_recipe
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.section import Section
from pretrain.export.custom import target as custom_target
from pretrain.export.custom.target import CLASS_FILES, Custom
from pretrain.export.hf_folder import write_hf_folder
from pretrain.export.name_map import to_theirs
from pretrain.export.targets import choose_target
from pretrain.export.writer import INDEX
from pretrain.model.config import RMSNormConfig
from pretrain.model.decoder import DecoderLM
from tests.support.custom_exports import LATENT, S, prompts_of, random_model, recipe_of, weights_of
from tests.support.in_memory_tensors import InMemoryTensors

TELLING = {
    "latents": [
        (
            f"model.attention={{kind: mla, {LATENT}, q_lora_rank: 16, bias: all, sinks: true,"
            " sliding_window: 7, full_attention_every: 2}"
        ),
        (
            "model.position={kind: yarn, rope_theta: 50, factor: 3,"
            " original_max_position_embeddings: 64, mscale: 0.7, mscale_all_dim: 1.2}"
        ),
        *("model.position.beta_fast=9", "model.position.truncate=false"),
    ],
    "heads": [
        "model.attention.bias=all",
        "model.attention.sinks=true",
        "model.attention.sliding_window=7",
        "model.feed_forward={kind: clamped_swiglu, bias: true, limit: 0.9}",
        "model.embedding_size=16",
        "model.head_bias=true",
        "model.norm.kind=layer_norm",
        "model.layer_pattern={kind: every_nth, n: 2}",
        "model.intermediate_size=24",
    ],
    "yarn": [
        (
            "model.position={kind: yarn, rope_theta: 50, factor: 3,"
            " original_max_position_embeddings: 64, attention_factor: 1.3}"
        ),
        "model.position.beta_fast=9",
        "model.position.truncate=false",
    ],
    "groups": [
        "model.moe.num_experts=8",
        (
            "model.moe.router={kind: softmax_topk, bias: true, temperature: 1.5,"
            " routed_scaling_factor: 1.7}"
        ),
        "model.moe.router.groups={num_groups: 4, top_k_groups: 1, score: max}",
        "model.moe.bias_balancing={}",
        "model.moe.num_shared_experts=2",
        "model.moe.shared_expert_gate=true",
    ],
    "DeepSpeed's gate": [
        *("model.moe.kind=deepspeed", "model.moe.causal=false", "model.moe.use_residual=true"),
        *("model.moe.eval_capacity_factor=0.6", "model.moe.min_capacity=2"),
    ],
    "product keys": [
        (
            "model.moe={kind: peer, product_key_sizes: [6, 5], num_heads: 2, top_k: 3, query_dim:"
            " 16, query_bias: true}"
        ),
        *("model.moe.num_shared_experts=1", "model.moe.shared_intermediate_size=20"),
    ],
}
# DeepSpeed's own gate is one router alone: a recipe cannot give it another.
FIXED_ROUTER = {
    f"moe.router.{name}"
    for name in ("kind", "norm_topk_prob", "routed_scaling_factor", "temperature")
}
# What says nothing about the numbers: names, and what building, training and generating read.
UNREAD = (
    "architectures",
    "auto_map",
    "model_type",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
)
OTHERS = {
    "rms_norm": "layer_norm",
    "layer_norm": "rms_norm",
    "pre": "post",
    "all": "qkv",
    "none": "qkv",
    "head": "none",
    "max": "top2_sum",
    "softmax_topk": "sigmoid_topk",
    "deepspeed": "router",
}
# min_capacity counts only where it is more than the factor gives, and eps where it is not nearly
# nothing.
LARGER = {"min_capacity": 60, "eps": 0.5}

LONG = ("yarn", "DeepSpeed's gate")
telling = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.full] if name in LONG else []) for name in TELLING],
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["a text to learn a few pairs from\n"] * 9, TrainBPE(vocab_size=260))


def telling_model(name: str) -> DecoderLM:
    return random_model(load_recipe("debug", ["model.vocab_size=250", *TELLING[name]]))


def their_tensors(model: DecoderLM) -> dict[str, Tensor]:
    return {
        name: tensor.clone()
        for name, tensor in to_theirs(
            Custom().links(model.config), InMemoryTensors(weights_of(model)), torch.float32
        )
    }


@torch.inference_mode()
def their_logits(config: dict[str, Any], tensors: dict[str, Tensor], ids_BS: Tensor) -> Tensor:
    from pretrain.export.custom.configuration_moe_pretrain import MoePretrainConfig
    from pretrain.export.custom.modeling_moe_pretrain import MoePretrainForCausalLM

    model = MoePretrainForCausalLM(MoePretrainConfig(**copy.deepcopy(config))).eval()
    tied = {"head.weight": tensors["embedding.weight"]} if config["tie_word_embeddings"] else {}
    model.load_state_dict(tensors | tied)
    logits: Tensor = model(ids_BS, use_cache=False).logits
    return logits


def leaves(
    section: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in section.items():
        if isinstance(value, dict) and name not in UNREAD:
            yield from leaves(value, (*path, name))
        elif name not in UNREAD and value is not None:
            yield (*path, name), value


def other(name: str, value: Any) -> Any:
    """A value of the same type that says something else."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return LARGER.get(name, value + 1 if isinstance(value, int) else value * 1.7)
    if isinstance(value, str):
        return OTHERS.get(value, "unheard of")
    return [4 if number is None else number + 1 for number in value]


def changed(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    section = config
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = other(path[-1], section[path[-1]])
    return config


class Export(NamedTuple):
    """A model, what its export holds, and the logits that it gives for some tokens."""

    model: DecoderLM
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    ids_BS: torch.Tensor
    logits: torch.Tensor


def exported_model(name: str) -> Export:
    model = telling_model(name)
    config = Custom().config(model.config, 0)
    tensors = their_tensors(model)
    ids_BS = prompts_of(recipe_of("position=rope"))["ids"]
    return Export(model, config, tensors, ids_BS, their_logits(config, tensors, ids_BS))


@telling
def test_whatever_config_json_says_changes_the_logits_or_is_refused(name: str) -> None:
    model, config, tensors, ids_BS, right = exported_model(name)
    with torch.inference_mode():
        torch.testing.assert_close(right, model.logits(ids_BS), atol=5e-5, rtol=0)
    unread = []
    for path, _ in leaves(config):
        try:
            wrong = their_logits(changed(config, path), tensors, ids_BS)
        except (
            RuntimeError,
            KeyError,
            IndexError,
            ValueError,
            TypeError,
            AssertionError,
            AttributeError,
        ):
            continue
        if (wrong - right).abs().max() < 1e-3:
            unread.append(".".join(path))
    without_meaning = (
        set() if config["moe"]["shared_intermediate_size"] else {"moe.shared_expert_gate"}
    )
    assert set(unread) == without_meaning | (FIXED_ROUTER if name == "DeepSpeed's gate" else set())


@telling
def test_every_tensor_of_an_export_changes_the_logits(name: str) -> None:
    _, config, tensors, ids_BS, right = exported_model(name)
    for tensor_name, tensor in tensors.items():
        generator = torch.Generator().manual_seed(2)
        wrong = their_logits(
            config,
            tensors | {tensor_name: tensor + torch.rand(tensor.shape, generator=generator)},
            ids_BS,
        )
        assert (wrong - right).abs().max() > 1e-3, tensor_name


def test_the_class_needs_torch_and_transformers_and_nothing_else() -> None:
    assert {path.name for path in CLASS_FILES} >= {
        "configuration_moe_pretrain.py",
        "modeling_moe_pretrain.py",
    }
    for path in CLASS_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                named = [node.module or ""] if node.level == 0 else []
                assert node.level == 0 or f"{node.module}.py" in {
                    other.name for other in CLASS_FILES
                }
            assert {module.split(".")[0] for module in named} <= {
                "torch",
                "transformers",
                *sys.stdlib_module_names,
            }, path.name


class Unheard(Section):
    kind: Literal["unheard"] = "unheard"


def test_a_kind_and_a_field_that_the_class_does_not_know_are_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = load_recipe("debug", ["model.vocab_size=250"])
    assert Custom().reasons_against(recipe.model) == []
    unheard = recipe.model.model_copy(update={"feed_forward": Unheard()})
    assert Custom().reasons_against(unheard) == [
        "model.feed_forward is of kind unheard, which the class does not have"
    ]
    monkeypatch.setitem(custom_target.COMPUTED, RMSNormConfig, ())
    assert Custom().reasons_against(recipe.model) == ["the class does not know model.norm.eps"]
    with pytest.raises(ConfigError, match=r"does not know model\.norm\.eps"):
        choose_target(recipe, "custom")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            [
                "model.moe.top_k=1",
                "model.moe.use_rts=true",
                "model.moe.router.norm_topk_prob=false",
            ],
            "use_rts",
        ),
        (["model.moe.top2_2nd_expert_sampling=true"], "top2_2nd_expert_sampling"),
    ],
)
def test_what_is_drawn_at_random_at_inference_is_refused(overrides: list[str], reason: str) -> None:
    recipe = load_recipe(
        "debug",
        ["model.vocab_size=250", "model.moe.kind=deepspeed", "model.moe.causal=false", *overrides],
    )
    assert [reason in sentence for sentence in Custom().reasons_against(recipe.model)] == [True]


def test_weights_that_do_not_belong_to_the_recipe_are_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    recipe = recipe_of("position=learned")
    weights = weights_of(random_model(recipe))
    with pytest.raises(CheckpointError, match="no name for the tensor 'extra'"):
        write_hf_folder(
            tmp_path,
            Custom(),
            recipe.model,
            InMemoryTensors(weights | {"extra": torch.zeros(1)}),
            tokenizer,
        )
    del weights["layers.1.feed_forward.experts.w3"]
    with pytest.raises(
        CheckpointError, match=r"has no tensor 'layers\.1\.feed_forward\.experts\.w3'"
    ):
        write_hf_folder(tmp_path, Custom(), recipe.model, InMemoryTensors(weights), tokenizer)


def test_shards_hold_the_same_tensors_as_one_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    recipe = recipe_of("feed_forward=gelu")
    model = random_model(recipe)
    write_hf_folder(
        tmp_path,
        Custom(),
        recipe.model,
        InMemoryTensors(weights_of(model)),
        tokenizer,
        shard_bytes=40_000,
    )
    assert (tmp_path / INDEX).is_file() and len(list(tmp_path.glob("*.safetensors"))) > 1
    written = {
        name: tensor
        for path in tmp_path.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    expected = their_tensors(model)
    assert written.keys() == expected.keys() and all(
        torch.equal(written[name], tensor) for name, tensor in expected.items()
    )


def test_a_new_model_of_the_class_is_initialised_and_starts_near_chance() -> None:
    from pretrain.export.custom.configuration_moe_pretrain import MoePretrainConfig
    from pretrain.export.custom.modeling_moe_pretrain import MoePretrainForCausalLM

    for name in ("heads", "groups", "product keys"):
        config = MoePretrainConfig(**Custom().config(telling_model(name).config, 0))
        model = MoePretrainForCausalLM(config)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert all(
            0 < parameter.std() < 0.1
            for key, parameter in model.named_parameters()
            if parameter.dim() > 1 and "bias" not in key
        ), name
        ids_BS = torch.randint(250, (2, S))
        loss = model(ids_BS, labels=ids_BS).loss
        assert loss.item() == pytest.approx(torch.tensor(250.0).log().item(), abs=0.3)
        loss.backward()
