"""Forty models that transformers made, imported and exported again: the same weights bit for bit,
the same logits, the same config.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.checkpoint.layout import read_recipe
from pretrain.checkpoint.validate import open_whole_weights
from pretrain.checkpoint.weights import load_model
from pretrain.core.errors import ConfigError
from pretrain.export.hf_folder import write_hf_folder
from pretrain.export.import_hf import import_hf
from pretrain.export.parity import load_exported, same_bits
from pretrain.export.targets import architectures, choose_target
from pretrain.export.writer import open_exported_weights
from tests.support.hf_models import (
    LLAMA3,
    MSCALE,
    ROPE,
    YARN,
    fields_of,
    older,
    saved,
    windows,
    write_config,
)
from tests.support.random_checkpoint import small_tokenizer

Form = Callable[[dict[str, Any]], dict[str, Any]]
TIED, WITHOUT = {"tie_word_embeddings": True}, {"head_dim": ...}
CARD = {
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
}
ALL_DEFAULTS = {
    "rope_parameters": ...,
    "tie_word_embeddings": ...,
    "initializer_range": ...,
    "rms_norm_eps": ...,
    "hidden_act": ...,
}
GREEDY = {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
# (architecture, form, changes); dict is the form of transformers 5, older that of 4.
MODELS: list[tuple[str, Form, dict[str, Any]]] = [
    ("llama", dict, {}),
    ("llama", older, {**TIED, "attention_bias": False, "mlp_bias": False}),
    ("llama", older, {**WITHOUT, "rope_parameters": YARN, "mlp_bias": False}),
    ("llama", dict, {**ALL_DEFAULTS, "num_key_value_heads": ...}),
    ("mistral", dict, {}),
    ("mistral", older, {"sliding_window": None, "head_dim": None}),
    ("mistral", older, {**TIED, "rope_parameters": LLAMA3}),
    ("mistral", dict, {**ALL_DEFAULTS, **WITHOUT, "sliding_window": ...}),
    ("qwen2", dict, {}),
    (
        "qwen2",
        older,
        {
            **TIED,
            "use_sliding_window": False,
            "max_window_layers": 28,
            "sliding_window": 4096,
            "layer_types": ...,
        },
    ),
    ("qwen2", older, {"layer_types": ..., **CARD}),
    (
        "qwen2",
        dict,
        {**ALL_DEFAULTS, "use_sliding_window": ..., "layer_types": ..., "sliding_window": ...},
    ),
    ("qwen3", dict, {}),
    ("qwen3", older, {**TIED, "attention_bias": False, "layer_types": ..., **CARD}),
    (
        "qwen3",
        older,
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 0,
            "layer_types": ...,
        },
    ),
    ("qwen3", dict, {**ALL_DEFAULTS, "attention_bias": ..., "max_window_layers": ...}),
    ("mixtral", dict, {}),
    ("mixtral", older, {**WITHOUT, "sliding_window": None, "rope_parameters": ROPE}),
    ("mixtral", older, {**TIED, "rope_parameters": LLAMA3}),
    ("mixtral", dict, {**ALL_DEFAULTS, "head_dim": None, "router_aux_loss_coef": ...}),
    ("qwen3_moe", dict, {}),
    ("qwen3_moe", older, {**CARD, "decoder_sparse_step": 1, "norm_topk_prob": False}),
    (
        "qwen3_moe",
        older,
        {**TIED, "attention_bias": True, "mlp_only_layers": [0], "decoder_sparse_step": 1},
    ),
    ("qwen3_moe", dict, {**ALL_DEFAULTS, **WITHOUT, "mlp_only_layers": None}),
    ("qwen2_moe", dict, {}),
    (
        "qwen2_moe",
        older,
        {**TIED, "qkv_bias": False, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 5},
    ),
    ("qwen2_moe", dict, {**ALL_DEFAULTS, "qkv_bias": ..., **CARD}),
    ("olmoe", dict, {}),
    (
        "olmoe",
        older,
        {**TIED, "attention_bias": True, "norm_topk_prob": True, "num_key_value_heads": 4},
    ),
    ("olmoe", dict, {**ALL_DEFAULTS, "num_key_value_heads": ..., "clip_qkv": ...}),
    ("deepseek_v2", dict, {}),
    (
        "deepseek_v2",
        older,
        {**GREEDY, "q_lora_rank": None, "rope_parameters": MSCALE | {"mscale_all_dim": 0.7}},
    ),
    ("deepseek_v2", older, {**TIED, **GREEDY, "attention_bias": True, "rope_parameters": ROPE}),
    ("deepseek_v3", dict, {}),
    (
        "deepseek_v3",
        older,
        {
            "q_lora_rank": None,
            "rope_parameters": {k: v for k, v in MSCALE.items() if k != "truncate"},
        },
    ),
    (
        "deepseek_v3",
        older,
        {
            **TIED,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "attention_bias": True,
            **CARD,
        },
    ),
    (
        "deepseek_v3",
        dict,
        {**ALL_DEFAULTS, "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 1, "n_group": 2},
    ),
    ("glm4_moe", dict, {}),
    (
        "glm4_moe",
        older,
        {**TIED, "use_qk_norm": False, "attention_bias": False, "n_group": 2, "topk_group": 1},
    ),
    (
        "glm4_moe",
        dict,
        {"rope_parameters": YARN | {"partial_rotary_factor": 1.0}, "n_shared_experts": 2},
    ),
    ("gpt_oss", dict, {}),
    (
        "gpt_oss",
        older,
        {
            **TIED,
            "layer_types": ["full_attention"] * 2,
            "sliding_window": 9,
            "attention_bias": False,
        },
    ),
    ("gpt_oss", dict, {**ALL_DEFAULTS, "layer_types": ..., "swiglu_alpha": ...}),
]
NAMES = [f"{number} {name} {form.__name__}" for number, (name, form, _) in enumerate(MODELS)]
QUICK = {
    number for number, (_, form, changes) in enumerate(MODELS) if changes and form is older
} - set(range(0, len(MODELS), 3))
# What an export says of its own tokenizer and files, and the older names of what the others say.
OWN = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "architectures",
    "transformers_version",
    "dtype",
    "_name_or_path",
}
OWN |= {
    "rope_parameters",
    "use_cache",
    "output_router_logits",
    "router_jitter_noise",
    "num_nextn_predict_layers",
}
OTHERS_SAID = {
    "max_window_layers",
    "mlp_only_layers",
    "decoder_sparse_step",
    "n_group",
    "topk_group",
    "head_dim",
    "norm_topk_prob",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(i, id=NAMES[i], marks=[] if i in QUICK else [pytest.mark.full])
        for i in range(len(MODELS))
    ],
)
def test_a_model_of_transformers_comes_in_and_goes_out_unchanged(
    number: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    name, form, changes = MODELS[number]
    source, ours, back = tmp_path / "hf", tmp_path / "ours", tmp_path / "back"
    saved(source, form(fields_of(name, **changes)), torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    conversion = import_hf(source, ours, overwrite=False)
    assert conversion.left_out == () and conversion.unchecked is None
    model, recipe = load_model(ours)
    ids_BS = windows()
    with torch.inference_mode():
        expected_BSV = theirs(ids_BS).logits
        torch.testing.assert_close(
            model.logits(ids_BS)[..., : expected_BSV.shape[-1]], expected_BSV, atol=1e-4, rtol=0
        )
        assert expected_BSV.std() > 0.3
    back.mkdir()
    write_hf_folder(
        back,
        choose_target(recipe, name),
        recipe.model,
        open_whole_weights(ours, read_recipe(ours).model),
        tokenizer,
        torch.bfloat16,
    )
    first, again = open_exported_weights(source), open_exported_weights(back)
    assert set(again.names) == set(first.names)
    assert all(same_bits(first.read(each), again.read(each)) for each in again.names)
    with torch.inference_mode():
        torch.testing.assert_close(
            load_exported(back)(ids_BS).logits, expected_BSV, atol=2e-6, rtol=0
        )
    check_configs(source, back)


def check_configs(source: Path, back: Path) -> None:
    first, again = (AutoConfig.from_pretrained(folder).to_dict() for folder in (source, back))
    for field, value in first.items():
        if field in OWN or (
            field in ("sliding_window", "use_sliding_window") and not windowed(first)
        ):
            continue
        if field in again and again[field] != value:
            # One thing can be said in two ways: these are compared by what they mean, the logits of
            # both.
            assert field in OTHERS_SAID, f"{field} was {value} and is {again[field]}"


def windowed(config: dict[str, Any]) -> bool:
    return "sliding_attention" in (config.get("layer_types") or ["sliding_attention"])


def test_the_table_has_forty_models_of_every_architecture_in_both_forms() -> None:
    assert len(MODELS) >= 40 and len(QUICK) >= 10
    for form in (dict, older):
        assert {name for name, its, _ in MODELS if its is form} == {
            target.name for target in architectures()
        }


@pytest.mark.parametrize(
    ("name", "form", "changes", "words"),
    [
        (
            "llama",
            older,
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0],
                    "long_factor": [2.0],
                }
            },
            "rope",
        ),
        ("qwen2", dict, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("olmoe", dict, {"clip_qkv": 8.0}, "clip_qkv"),
        (
            "glm4_moe",
            older,
            {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ("deepseek_v3", dict, {"rope_interleave": False}, "rope_interleave"),
        ("mixtral", older, {"hidden_act": "gelu"}, "hidden_act"),
        (
            "gpt_oss",
            dict,
            {"layer_types": ["full_attention"] * 2, "sliding_window": None},
            "sliding_window",
        ),
    ],
)
def test_what_cannot_be_said_is_refused_with_its_field(
    name: str, form: Form, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    saved(tmp_path / "hf", form(fields_of(name)))
    write_config(tmp_path / "hf", form(fields_of(name, **changes)))
    with pytest.raises(ConfigError, match=words):
        import_hf(tmp_path / "hf", tmp_path / "ours", overwrite=False)
    assert not (tmp_path / "ours").exists()
