"""Every field of a config.json, left out and null: read as transformers reads it, or refused by its
name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pretrain.checkpoint.weights_only import tensor_shapes
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.export.architectures.llama_like import LlamaLike
from pretrain.export.hf_recipe import recipe_of
from pretrain.export.import_hf import architecture_of
from pretrain.export.name_map import their_forms, to_ours
from pretrain.export.parity import compare_logits, reference_model
from pretrain.export.targets import architectures
from pretrain.export.writer import open_exported_weights
from tests.support.hf_models import (
    BASES,
    LLAMA3,
    ROPE,
    fields_of,
    older,
    saved,
    windows,
    write_config,
)
from tests.support.in_memory_tensors import InMemoryTensors

# A size that is another one makes its neighbours not fit: the refusal names one of them, in
# transformers' words or in ours.
SIZES = {
    "attention heads",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
}
SIZES |= {
    "num_hidden_layers",
    "layer_types",
    "max_window_layers",
    "mlp_only_layers",
    "first_k_dense_replace",
    "decoder_sparse_step",
}
WINDOWS = {"use_sliding_window", "sliding_window", "layer_types"}
COUNTS = {
    "mixture of experts",
    "first_k_dense_replace",
    "n_group",
    "topk_group",
    "top_k",
    "num_experts",
    "groups",
    "num_experts_per_tok",
    "n_routed_experts",
    "num_local_experts",
}
QUICK = {"mixtral", "deepseek_v3", "qwen2"}


def variants(name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The field that is changed, how, and the whole config: in transformers 5's form, and for
    rotary fields in the older one too.
    """
    base = fields_of(name)
    for field in base:
        if field != "model_type":
            yield field, "left out", fields_of(name, **{field: ...})
            yield field, "null", fields_of(name, **{field: None})
    if "head_dim" not in base:
        yield "head_dim", "null", {**base, "head_dim": None}
    for form in (dict, older):
        written = form(base)
        section = "rope_parameters" if form is dict else "rope_scaling"
        for field in written[section] or {}:
            rest = {key: value for key, value in written[section].items() if key != field}
            yield field, f"left out of {section}", {**written, section: rest}
            yield (
                field,
                f"null in {section}",
                {**written, section: {**written[section], field: None}},
            )
    if older(base)["rope_scaling"]:
        renamed = {
            {"rope_type": "type"}.get(key, key): value
            for key, value in older(base)["rope_scaling"].items()
        }
        yield "type", "for rope_type", {**older(base), "rope_scaling": renamed}
    for field in ("rope_theta", "rope_scaling", "torch_dtype"):
        yield (
            field,
            "left out of the older form",
            {key: value for key, value in older(base).items() if key != field},
        )
        yield field, "null in the older form", {**older(base), field: None}


def read(folder: Path) -> tuple[LlamaLike, Recipe]:
    target, config = architecture_of(folder)
    return target, recipe_of(folder, folder / "ours", target, config)


def their_elements(model: PreTrainedModel) -> int:
    buffers = [buffer for name, buffer in model.named_buffers() if "e_score" in name]
    tied = {id(tensor): tensor for tensor in [*model.parameters(), *buffers]}
    return sum(tensor.numel() for tensor in tied.values())


def our_elements(target: LlamaLike, recipe: Recipe) -> int:
    """Of the export of the recipe's model, counted without memory for them."""
    dense, experts = tensor_shapes(recipe.model)
    ours = InMemoryTensors(
        {name: torch.empty(shape, device="meta") for name, shape in (dense | experts).items()}
    )
    return (
        sum(
            form.bytes
            for form in their_forms(target.links(recipe.model), ours, torch.float32).values()
        )
        // 4
    )


def same_logits(target: LlamaLike, recipe: Recipe, theirs: PreTrainedModel, folder: Path) -> float:
    dense, experts = tensor_shapes(recipe.model)
    links = target.links(recipe.model)
    ours: dict[str, Tensor] = dict(to_ours(links, open_exported_weights(folder), dense | experts))
    parity = compare_logits(
        reference_model(recipe.model, InMemoryTensors(ours), torch.float32), theirs, windows(1)
    )
    assert parity.logits_std > 0.1
    return parity.max_difference


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.full]) for name in BASES],
)
def test_a_field_that_is_absent_or_null_is_read_as_transformers_reads_it(
    name: str, tmp_path: Path
) -> None:
    base = saved(tmp_path / "base", fields_of(name))
    weights, numbers = base.state_dict(), their_elements(base)
    read_too, refused, compared = [], [], 0
    for number, (field, change, fields) in enumerate(variants(name)):
        case = f"{field} {change}"
        folder = write_config(tmp_path / str(number), fields)
        try:
            target, recipe = read(folder)
        except (ConfigError, CheckpointError) as error:
            related = {field}.union(
                *(group for group in (SIZES, WINDOWS, COUNTS) if field in group)
            )
            assert any(each in str(error) for each in related), f"{case}: {error}"
            refused.append(case)
            continue
        read_too.append(case)
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            theirs = AutoModelForCausalLM.from_config(config)
        assert their_elements(theirs) == our_elements(target, recipe), case
        if their_elements(theirs) == numbers and {
            n: t.shape for n, t in theirs.state_dict().items()
        } == {n: t.shape for n, t in weights.items()}:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            model.load_state_dict(weights)
            assert same_logits(target, recipe, model, tmp_path / "base") <= 1e-4, case
            compared += 1
    assert len(read_too) >= 20 and compared >= 15 and refused, (
        name,
        len(read_too),
        compared,
        refused,
    )


def test_every_architecture_that_is_imported_has_a_base() -> None:
    assert BASES.keys() == {target.name for target in architectures()}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"head_dim": ..., "rope_parameters": ROPE}),
        ("mixtral", {"head_dim": None, "rope_parameters": ROPE}),
        (
            "deepseek_v3",
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 40,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                },
                "rope_theta": 10000,
            },
        ),
        (
            "qwen3_moe",
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
        (
            "llama",
            {
                "rope_scaling": {name: LLAMA3[name] for name in LLAMA3 if name != "rope_theta"},
                "rope_theta": 500000.0,
            },
        ),
    ],
)
def test_forms_of_published_cards_are_read(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Mixtral-8x7B names no head_dim, DeepSeek-V3 no truncate, Qwen3-MoE's card gives three fields
    of YaRN.
    """
    changes = {"rope_parameters": ..., **changes} if "rope_scaling" in changes else changes
    folder = tmp_path / "hf"
    theirs = saved(folder, fields_of(name, **changes))
    target, recipe = read(folder)
    assert same_logits(target, recipe, theirs, folder) <= 1e-4


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'linear'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'dynamic'",
        ),
        ("mistral", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ("llama", {"is_causal": False}, "is_causal"),
        ("llama", {"sliding_window": 7}, "sliding_window"),
        ("mixtral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (
            "glm4_moe",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor = 0.5",
        ),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen2_moe", {"use_sliding_window": True}, "sliding"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        (
            "gpt_oss",
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            "rope_parameters",
        ),
    ],
)
def test_what_no_recipe_says_is_refused_by_its_name(
    name: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    changes = {"rope_parameters": ..., **changes} if "rope_scaling" in changes else changes
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        read(write_config(tmp_path, fields_of(name, **changes)))
