"""Tiny models of every architecture that is imported, made by transformers' own classes with random
weights.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCAB = 48
_PLAIN = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DENSE = {**_PLAIN, "intermediate_size": 24, "num_key_value_heads": 2}
_LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 6,
}
_DEEPSEEK = {
    **_PLAIN,
    **_LATENT,
    "rms_norm_eps": 1e-6,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 4,
    "topk_group": 2,
    "attention_bias": False,
}
_QWEN = {
    **_DENSE,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "router_aux_loss_coef": 0.02,
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "attention_factor": 1.25,
    "truncate": False,
}
MSCALE = {name: value for name, value in YARN.items() if name != "attention_factor"} | {
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
# Fields of config.json; nothing is left to a default but what no release before 5 knew.
BASES: dict[str, dict[str, Any]] = {
    "llama": {
        **_DENSE,
        "head_dim": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LLAMA3,
    },
    "mistral": {**_DENSE, "head_dim": 8, "sliding_window": 7, "rope_parameters": ROPE},
    "qwen2": {
        **_DENSE,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 0,
        "rope_parameters": ROPE,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3": {
        **_DENSE,
        "head_dim": 8,
        "attention_bias": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 2,
        "rope_parameters": ROPE,
        "layer_types": ["full_attention"] * 2,
    },
    "mixtral": {
        **_DENSE,
        "head_dim": 8,
        "sliding_window": 7,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.02,
        "rope_parameters": YARN,
    },
    "qwen3_moe": {**_QWEN, "head_dim": 8, "attention_bias": False, "rope_parameters": YARN},
    "qwen2_moe": {
        **_QWEN,
        "shared_expert_intermediate_size": 12,
        "qkv_bias": True,
        "rope_parameters": ROPE,
    },
    "olmoe": {
        **_DENSE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.02,
        "attention_bias": False,
        "clip_qkv": None,
        "rope_parameters": ROPE,
    },
    "deepseek_v2": {
        **_DEEPSEEK,
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "mlp_bias": False,
        "rope_parameters": MSCALE,
    },
    "deepseek_v3": {
        **_DEEPSEEK,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
        "rope_parameters": MSCALE,
    },
    "glm4_moe": {
        **_DENSE,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "moe_intermediate_size": 8,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
        "attention_bias": True,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0},
    },
    "gpt_oss": {
        **_DENSE,
        "head_dim": 8,
        "sliding_window": 7,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "swiglu_limit": 3.0,
        "swiglu_alpha": 1.5,
        "attention_bias": True,
        "rope_parameters": YARN,
        "layer_types": ["sliding_attention", "full_attention"],
        "router_aux_loss_coef": 0.02,
    },
}


def fields_of(name: str, **changes: Any) -> dict[str, Any]:
    """``config.json`` of a tiny model; a field that is changed to ``...`` is left out."""
    fields = {"model_type": name, **deepcopy(BASES[name]), **changes}
    return {field: value for field, value in fields.items() if value is not ...}


def older(fields: dict[str, Any]) -> dict[str, Any]:
    """The same as transformers 4 writes it: rope_theta, rope_scaling and torch_dtype."""
    rope = dict(fields.get("rope_parameters") or {})
    rest = {field: value for field, value in fields.items() if field != "rope_parameters"}
    theta, partial = rope.pop("rope_theta", None), rope.pop("partial_rotary_factor", None)
    rest |= {} if theta is None else {"rope_theta": theta}
    rest |= {} if partial is None else {"partial_rotary_factor": partial}
    scaled = rope.get("rope_type", "default") != "default"
    return {
        **rest,
        "rope_scaling": rope if scaled else None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.0",
    }


def write_config(folder: Path, fields: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def build(folder: Path) -> PreTrainedModel:
    """The model of a folder's config.json with random weights: norms away from one, everything else
    from zero.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32
    )
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                tensor.normal_(1.0 if "norm" in name and tensor.dim() == 1 else 0.0, 0.3)
    return model.eval()


def saved(
    folder: Path, fields: dict[str, Any], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Writes weights as transformers does, and ``config.json`` as given; returns the model."""
    model = build(write_config(folder, fields))
    exact = {name: buffer.clone() for name, buffer in model.named_buffers() if "e_score" in name}
    model = model.to(dtype)
    for name, buffer in model.named_buffers():
        if name in exact:
            buffer.data = exact[name]  # fp32 in published models
    model.save_pretrained(folder)
    write_config(folder, fields)
    return model


def windows(count: int = 2, length: int = 64) -> Tensor:
    return torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(1))
