"""A recipe's model as the arguments of Megatron-LM, and back.

The names are those of its ``args`` and, with a few exceptions, of its options: ``num_layers`` is
``--num-layers``. What they cannot say is refused by the name of the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject
from pretrain.export.architectures.deepseek_v2 import LATENT
from pretrain.export.architectures.llama_like import EXPERTS, GROUPED_QUERY, TRUNK
from pretrain.export.architectures.sections import grouped_query, latent, rotary, routed
from pretrain.export.features import ANY, Takes, reasons_against
from pretrain.export.megatron.blocks import VOCABULARY_MULTIPLE
from pretrain.model.config import ModelConfig
from pretrain.model.moe.config import RoutedMoE
from pretrain.model.moe.routers import SigmoidTopK
from pretrain.model.positions.config import Llama3, Yarn

NAME = "megatron"
TAKES: Takes = {
    **TRUNK,
    **GROUPED_QUERY,
    **LATENT,
    **EXPERTS,
    "attention.kind": ("gqa", "mla"),
    "attention.bias": ("none", "qkv"),
    "attention.qk_norm": ("none", "head"),
    "position.attention_factor": (None,),
    "position.truncate": (True,),
    "moe.num_shared_experts": ANY,
    "moe.bias_balancing": ANY,
    "moe.router.kind": ("softmax_topk", "sigmoid_topk"),
    "moe.router.norm_topk_prob": ANY,
    "moe.router.routed_scaling_factor": ANY,
    "moe.router.groups": ANY,
}
# What RotaryEmbedding._apply_scaling of Megatron fixes.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MLA_SIZES = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}


def refuse_unless_expressible(model: ModelConfig, name: str) -> None:
    """Check that Megatron's arguments can say what the model computes.

    Raises:
        ConfigError: with every field that they cannot say.
    """
    if reasons := reasons_against_megatron(model):
        raise ConfigError(
            f"the model of '{name}' cannot be said in Megatron's arguments: {'; '.join(reasons)};"
            " convert it with --to safetensors, or train one without"
        )


def reasons_against_megatron(model: ModelConfig) -> list[str]:
    """A clause for each field of the model that Megatron's arguments cannot say."""
    reasons = reasons_against(model, TAKES, NAME)
    if not reasons:
        reasons += _position_reasons(model)
        if model.moe_layers:
            reasons += _router_reasons(routed(model))
    return reasons


def _position_reasons(model: ModelConfig) -> list[str]:
    position = model.position
    if isinstance(position, Yarn) and not model.attention.has_latents:
        return [f"model.position.kind is yarn, and {NAME} has it with attention.kind=mla only"]
    if isinstance(position, Llama3):
        if model.attention.has_latents:
            return [f"model.position.kind is llama3, and {NAME} has it without mla only"]
        return [
            f"model.position.{name} is {getattr(position, name)}, and {NAME} has only {value}"
            for name, value in LLAMA3.items()
            if getattr(position, name) != value
        ]
    return []


def _router_reasons(moe: RoutedMoE) -> list[str]:
    router = moe.router
    reasons = []
    if not isinstance(router, SigmoidTopK):
        if moe.bias_balancing is not None:
            reasons.append(
                f"model.moe.bias_balancing is set, and {NAME} has it for sigmoid_topk only"
            )
        if router.norm_topk_prob and moe.top_k == 1:
            reasons.append(f"model.moe.router.norm_topk_prob is true, which {NAME} refuses for one")
    elif router.norm_topk_prob != (moe.top_k > 1):
        reasons.append(
            f"model.moe.router.norm_topk_prob is {str(router.norm_topk_prob).lower()}, and {NAME}"
            " divides the weights of several sigmoid scores by their sum, and never that of one"
        )
    groups = router.groups
    if groups is not None:
        # group_limited_topk of moe_utils.py.
        best = moe.top_k // groups.top_k_groups
        if best != {"max": 1, "top2_sum": 2}[groups.score]:
            reasons.append(
                f"model.moe.router.groups.score is {groups.score}, and {NAME} chooses groups by"
                f" their top_k // top_k_groups = {best} best experts"
            )
        elif not isinstance(router, SigmoidTopK) and router.norm_topk_prob and best > 1:
            reasons.append(
                f"model.moe.router.groups.score is top2_sum, and {NAME} adds logits there instead"
                " of probabilities"
            )
    return reasons


def arguments_of(model: ModelConfig) -> JsonObject:
    """The arguments that determine a model, and how it is initialised and balanced."""
    position = rotary(model)
    is_llama3 = isinstance(position, Llama3)
    arguments: JsonObject = {
        "num_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.intermediate_size
        or (routed(model).moe_intermediate_size if model.moe_layers else None),
        "num_attention_heads": model.attention.num_attention_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "seq_length": model.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": _whole(position.rope_theta),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": is_llama3,
        "rope_scaling_factor": position.factor if isinstance(position, Llama3) else 8.0,
        "normalization": "RMSNorm",
        "norm_epsilon": model.norm.eps,
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not model.tie_word_embeddings,
        "vocab_size": model.vocab_size,
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
        "attention_dropout": model.dropout.attention,
        "hidden_dropout": model.dropout.residual,
        "init_method_std": model.initializer_range,
    }
    arguments |= _latent(model) if model.attention.has_latents else _grouped_query(model)
    return arguments | (_experts(model) if model.moe_layers else {"num_experts": None})


def _grouped_query(model: ModelConfig) -> JsonObject:
    attention = grouped_query(model)
    return {
        "multi_latent_attention": False,
        "group_query_attention": True,
        "num_query_groups": attention.num_key_value_heads,
        "kv_channels": attention.head_dim,
        "add_qkv_bias": attention.bias == "qkv",
        "qk_layernorm": attention.qk_norm == "head",
    }


def _latent(model: ModelConfig) -> JsonObject:
    attention, position = latent(model), rotary(model)
    sizes = {theirs: getattr(attention, ours) for theirs, ours in MLA_SIZES.items()}
    yarn: JsonObject = {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0}
    if isinstance(position, Yarn):
        yarn = {
            "rope_type": "yarn",
            "rotary_scaling_factor": position.factor,
            "original_max_position_embeddings": position.original_max_position_embeddings,
            "beta_fast": position.beta_fast,
            "beta_slow": position.beta_slow,
            # Megatron's formula with these is the attention factor of a recipe without both.
            "mscale": 1.0 if position.mscale is None else position.mscale,
            "mscale_all_dim": position.mscale_all_dim or 0.0,
        }
    return {
        "multi_latent_attention": True,
        **sizes,
        "kv_channels": attention.v_head_dim,
        "add_qkv_bias": False,
        "qk_layernorm": True,
        **yarn,
    }


def _experts(model: ModelConfig) -> JsonObject:
    moe = routed(model)
    router, groups = moe.router, moe.router.groups
    is_sigmoid = isinstance(router, SigmoidTopK)
    layers = [int(layer in model.moe_layers) for layer in range(model.num_hidden_layers)]
    loss, weight = next(
        (
            (kind, weight)
            for kind, weight in (
                ("aux_loss", moe.aux_loss_weight),
                ("seq_aux_loss", moe.sequence_loss_weight),
            )
            if weight
        ),
        ("none", 0.0),
    )
    balanced = moe.bias_balancing
    return {
        "num_experts": moe.num_experts,
        "moe_layer_freq": 1 if all(layers) else layers,
        "moe_ffn_hidden_size": moe.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": moe.shared_width or None,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": ("sigmoid" if is_sigmoid else "softmax"),
        "moe_router_pre_softmax": not is_sigmoid and not router.norm_topk_prob,
        "moe_router_topk_scaling_factor": (
            None if router.routed_scaling_factor == 1.0 else router.routed_scaling_factor
        ),
        "moe_router_num_groups": None if groups is None else groups.num_groups,
        "moe_router_group_topk": None if groups is None else groups.top_k_groups,
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": balanced is not None,
        "moe_router_bias_update_rate": 0.001 if balanced is None else balanced.update_rate,
        "moe_router_load_balancing_type": loss,
        "moe_aux_loss_coeff": weight,
        "moe_z_loss_coeff": moe.z_loss_weight or None,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
    }


def _whole(number: float) -> int | float:
    """Megatron-LM's option for the base of RoPE takes whole numbers only."""
    return int(number) if number == math.floor(number) else number


# How options are called whose name is not that of the argument, and switches that say the opposite.
OPTIONS = {
    "add_bias_linear": "--disable-bias-linear",
    "norm_epsilon": "--norm-epsilon",
}
INVERTED = {"add_bias_linear"}


def options_of(arguments: Mapping[str, Any]) -> list[str]:
    """The arguments as options of Megatron-LM's command, without those at a switch's default."""
    options = []
    for name, value in arguments.items():
        option = OPTIONS.get(name, f"--{name.replace('_', '-')}")
        if isinstance(value, bool):
            if value != (name in INVERTED):
                options.append(option)
        elif isinstance(value, list):
            # Megatron reads a list of layers as Python.
            options.append(f"{option}={str(value).replace(' ', '')}")
        elif value is not None:
            options.append(f"{option}={value}")
    return options


def for_namespace(arguments: Mapping[str, Any], padded_vocab_size: int) -> JsonObject:
    """The ``args`` of a checkpoint: those of the model, and what Megatron asks while it loads."""
    return {
        **arguments,
        "layernorm_epsilon": arguments["norm_epsilon"],
        "padded_vocab_size": padded_vocab_size,
        "add_position_embedding": True,
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "world_size": 1,
        "data_parallel_size": 1,
        "ckpt_format": "torch_dist",
        "use_dist_ckpt": True,
        # There is neither: Megatron starts both anew instead of looking for them.
        "no_save_optim": True,
        "no_save_rng": True,
    }
