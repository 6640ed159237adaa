"""Megatron-LM's arguments as a recipe; what no recipe can say is refused by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.config.load import validate_recipe
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.files import JsonObject
from pretrain.export.hf_recipe import tokenizer_section
from pretrain.export.hf_tokenizer import TokenIds
from pretrain.export.megatron.arguments import (
    LLAMA3,
    MLA_SIZES,
    arguments_of,
    reasons_against_megatron,
)

# Arguments that must have one of these values if they are there at all.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "softmax_type": ("vanilla", None),
    "glu_linear_offset": (0.0, None),
}
# Arguments that change the model unless they are absent, false or 0.
UNSAID = (
    *("apply_layernorm_1p", "apply_residual_connection_post_layernorm", "attention_output_gate"),
    *("squared_relu", "quick_geglu", "openai_gelu", "activation_func_clamp_value"),
    *("rotary_interleaved", "rotary_seq_len_interpolation_factor", "no_rope_freq", "qk_l2_norm"),
    *("window_size", "linear_attention_freq", "experimental_attention_variant"),
    *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
    *("hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model", "use_legacy_models"),
    *("moe_expert_capacity_factor", "moe_latent_size", "moe_apply_probs_on_input"),
    *("moe_shared_expert_gate", "use_shared_expert_gate", "moe_router_force_load_balancing"),
)
# What does not change the function, or is another way to say what other arguments do.
NEUTRAL = {
    *("seq_length", "vocab_size", "make_vocab_size_divisible_by", "init_method_std"),
    *("attention_dropout", "hidden_dropout", "ffn_hidden_size", "kv_channels", "mscale"),
    *("num_query_groups", "group_query_attention", "rope_scaling_factor", "moe_layer_freq"),
    *("rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("moe_router_dtype", "moe_router_bias_update_rate", "moe_router_load_balancing_type"),
    *("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_grouped_gemm", "moe_token_dispatcher_type"),
}


def recipe_of(
    home: Path, output: Path, arguments: Mapping[str, Any], origin: Path, vocabulary_rows: int
) -> Recipe:
    """A recipe with the model of the arguments; its training section is only a start.

    Args:
        home: the folder that a tokenizer may be in.
        output: the folder that will have the tokenizer.
        origin: the file of the arguments, for errors.
        vocabulary_rows: of the embedding, padding included.

    Raises:
        ConfigError: for an argument that no recipe can express.
        CheckpointError: if they describe no model.
    """
    _refuse_unsaid(arguments, origin)
    vocab_size = _vocab_size(arguments, vocabulary_rows)
    try:
        section = {"vocab_size": vocab_size, **_model_section(arguments)}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the arguments in {origin} describe no model ({type(error).__name__}:"
            f" {' '.join(str(error).split())[:200]}): take another checkpoint"
        ) from None
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", home.resolve().name).lstrip("._-") or "megatron"
    tokens = TokenIds(vocab_size, None, None, None)
    content = {
        "name": name,
        "data": {"tokenizer": tokenizer_section(home, output, tokens)},
        "model": section,
        "train": {
            "sequence_length": min(section["max_position_embeddings"], 4096),
            "micro_batch_size": 1,
            "global_batch_size": 8,
            "train_tokens": 1_000_000_000,
        },
        "optimizer": {"kind": "adamw", "learning_rate": 1e-5},
    }
    recipe = validate_recipe(content, str(origin))
    if reasons := reasons_against_megatron(recipe.model):
        raise ConfigError(f"{origin} describes what megatron is not: {'; '.join(reasons)}")
    # The check of the whole conversion: exported again, the recipe must give the same arguments.
    said = _without_defaults(arguments)
    for argument, value in _without_defaults(arguments_of(recipe.model)).items():
        if argument in said and argument not in NEUTRAL and said[argument] != value:
            raise ConfigError(
                f"{origin} says {argument} = {str(said[argument])[:80]}, and the nearest recipe"
                f" would be {value}: it cannot be converted exactly"
            )
    return recipe


def _without_defaults(arguments: Mapping[str, Any]) -> JsonObject:
    """The arguments without those that change nothing, so that equal models have equal ones."""
    said = {name: value for name, value in arguments.items() if value is not None}
    if said.get("moe_router_topk_scaling_factor") == 1.0:
        del said["moe_router_topk_scaling_factor"]
    if not said.get("moe_router_group_topk"):
        said.pop("moe_router_num_groups", None)
    # Megatron's own examples of DeepSeek-V3 say both.
    if said.get("moe_router_score_function") == "sigmoid":
        said.pop("moe_router_pre_softmax", None)
    return said


def _refuse_unsaid(arguments: Mapping[str, Any], origin: Path) -> None:
    for name, allowed in FIXED.items():
        if name in arguments and arguments[name] not in allowed:
            raise ConfigError(
                f"{origin} says {name} = {str(arguments[name])[:80]}, and recipes can say only"
                f" {allowed[0]}: it cannot be converted"
            )
    for name in UNSAID:
        if arguments.get(name):
            raise ConfigError(
                f"{origin} says {name} = {str(arguments[name])[:80]}, which no recipe can say: it"
                " cannot be converted"
            )
    kinds = _listed(arguments.get("moe_router_load_balancing_type"))
    if "sinkhorn" in kinds:
        raise ConfigError(
            f"{origin} says moe_router_load_balancing_type = sinkhorn, which no recipe can say: it"
            " cannot be converted"
        )


def _vocab_size(arguments: Mapping[str, Any], rows: int) -> int:
    size = arguments.get("vocab_size")
    if type(size) is not int:
        return rows
    # Megatron's NullTokenizer adds an end-of-document token to --vocab-size.
    size += arguments.get("tokenizer_type") == "NullTokenizer"
    return size if 0 < size <= rows else rows


def _model_section(arguments: Mapping[str, Any]) -> JsonObject:
    heads = arguments["num_attention_heads"]
    is_latent = bool(arguments.get("multi_latent_attention"))
    epsilon = arguments.get("norm_epsilon", arguments.get("layernorm_epsilon"))
    section: JsonObject = {
        "hidden_size": arguments["hidden_size"],
        "num_hidden_layers": arguments["num_layers"],
        "max_position_embeddings": arguments.get("max_position_embeddings")
        or arguments["seq_length"],
        "attention": _latent(arguments) if is_latent else _grouped_query(arguments),
        "position": _position_section(arguments, is_latent),
        "norm": {"kind": "rms_norm", "eps": epsilon},
        "layer_pattern": {"kind": "all_dense"},
        "tie_word_embeddings": not arguments["untie_embeddings_and_output_weights"],
        "initializer_range": arguments.get("init_method_std", 0.02),
    }
    section["attention"]["num_attention_heads"] = heads
    if not arguments.get("num_experts"):
        return section | {"intermediate_size": arguments["ffn_hidden_size"]}
    pattern = _pattern(arguments)
    section |= {"layer_pattern": pattern, "moe": _experts(arguments)}
    if pattern["kind"] != "all_moe":
        section["intermediate_size"] = arguments["ffn_hidden_size"]
    return section


def _grouped_query(arguments: Mapping[str, Any]) -> JsonObject:
    heads = arguments["num_attention_heads"]
    groups = arguments.get("num_query_groups") if arguments.get("group_query_attention") else None
    return {
        "kind": "gqa",
        "num_key_value_heads": groups or heads,
        "head_dim": arguments.get("kv_channels") or arguments["hidden_size"] // heads,
        "bias": "qkv" if arguments.get("add_qkv_bias") else "none",
        "qk_norm": "head" if arguments.get("qk_layernorm") else "none",
    }


def _latent(arguments: Mapping[str, Any]) -> JsonObject:
    sizes = {ours: arguments[theirs] for theirs, ours in MLA_SIZES.items()}
    return {"kind": "mla", **sizes}


def _position_section(arguments: Mapping[str, Any], is_latent: bool) -> JsonObject:
    base = {"rope_theta": float(arguments["rotary_base"])}
    # Without --rope-type Megatron takes yarn for latent attention.
    if is_latent and arguments.get("rope_type") != "rope":
        mscales = {name: float(arguments[name]) for name in ("mscale", "mscale_all_dim")}
        return {
            "kind": "yarn",
            **base,
            "factor": float(arguments["rotary_scaling_factor"]),
            "original_max_position_embeddings": arguments["original_max_position_embeddings"],
            "beta_fast": float(arguments["beta_fast"]),
            "beta_slow": float(arguments["beta_slow"]),
            # A recipe without both has Megatron's defaults, 1 and 0.
            **(mscales if mscales != {"mscale": 1.0, "mscale_all_dim": 0.0} else {}),
        }
    if arguments.get("use_rope_scaling"):
        factor = float(arguments["rope_scaling_factor"])
        return {"kind": "llama3", **base, "factor": factor, **LLAMA3}
    return {"kind": "rope", **base}


def _pattern(arguments: Mapping[str, Any]) -> JsonObject:
    layers = int(arguments["num_layers"])
    frequency = arguments.get("moe_layer_freq", 1)
    if isinstance(frequency, int):
        frequency = [int(layer % frequency == 0) for layer in range(layers)]
    if len(frequency) != layers:
        raise ValueError(f"moe_layer_freq has {len(frequency)} entries for {layers} layers")
    dense = [layer for layer in range(layers) if not frequency[layer]]
    if not dense:
        return {"kind": "all_moe"}
    if dense == list(range(len(dense))):
        return {"kind": "first_k_dense", "k": len(dense)}
    for n in range(2, layers + 1):
        if dense == [layer for layer in range(layers) if (layer + 1) % n]:
            return {"kind": "every_nth", "n": n}
    raise ConfigError(
        f"moe_layer_freq has dense layers {dense[:20]} of {layers}, and recipes know a regular"
        " step or the first ones only: it cannot be converted"
    )


def _experts(arguments: Mapping[str, Any]) -> JsonObject:
    width = arguments.get("moe_ffn_hidden_size") or arguments["ffn_hidden_size"]
    shared = arguments.get("moe_shared_expert_intermediate_size") or 0
    top_k = arguments["moe_router_topk"]
    is_sigmoid = arguments.get("moe_router_score_function") == "sigmoid"
    is_normalised = top_k > 1 if is_sigmoid else not arguments.get("moe_router_pre_softmax")
    router: JsonObject = {
        "kind": "sigmoid_topk" if is_sigmoid else "softmax_topk",
        "norm_topk_prob": is_normalised,
        "routed_scaling_factor": arguments.get("moe_router_topk_scaling_factor") or 1.0,
    }
    if kept := arguments.get("moe_router_group_topk"):
        router["groups"] = {
            "num_groups": arguments["moe_router_num_groups"],
            "top_k_groups": kept,
            "score": "top2_sum" if top_k // kept == 2 else "max",
        }
    whole = shared % width == 0
    moe: JsonObject = {
        "kind": "dropless",
        "num_experts": arguments["num_experts"],
        "top_k": top_k,
        "moe_intermediate_size": width,
        "num_shared_experts": shared // width if whole else 1,
        "router": router,
        "z_loss_weight": arguments.get("moe_z_loss_coeff") or 0.0,
        **_losses(arguments),
    }
    if not whole:
        moe["shared_intermediate_size"] = shared
    if arguments.get("moe_router_enable_expert_bias"):
        moe["bias_balancing"] = {"update_rate": arguments.get("moe_router_bias_update_rate", 1e-3)}
    return moe


def _losses(arguments: Mapping[str, Any]) -> JsonObject:
    kinds = _listed(arguments.get("moe_router_load_balancing_type"))
    weights = _listed(arguments.get("moe_aux_loss_coeff"))
    losses = dict(zip(kinds, weights, strict=False))
    whole = losses.get("aux_loss") or losses.get("global_aux_loss") or 0.0
    is_global = bool(losses.get("global_aux_loss")) and not losses.get("aux_loss")
    return {
        "aux_loss_weight": whole,
        "sequence_loss_weight": losses.get("seq_aux_loss") or 0.0,
        **({"balance_scope": "global_batch"} if is_global else {}),
    }


def _listed(value: Any) -> list[Any]:
    """Newer versions take several losses, older ones one."""
    return [] if value is None else value if isinstance(value, list) else [value]
