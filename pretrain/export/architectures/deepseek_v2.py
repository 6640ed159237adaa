"""The architecture ``deepseek_v2``: latent attention, softmax routing without renormalisation.

V3 shares much of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pretrain.core.files import JsonObject
from pretrain.export.architectures.llama_like import (
    EXPERTS,
    TRUNK,
    LlamaLike,
    absent_shared_experts,
    shared_links,
)
from pretrain.export.architectures.sections import latent, routed
from pretrain.export.features import ANY, Takes
from pretrain.export.name_map import Link, Links, RotaryRows, expand
from pretrain.model.config import ModelConfig

LATENT: Takes = {
    "attention.kind": ("mla",),
    "attention.num_attention_heads": ANY,
    "attention.q_lora_rank": ANY,
    "attention.kv_lora_rank": ANY,
    "attention.qk_rope_head_dim": ANY,
    "attention.qk_nope_head_dim": ANY,
    "attention.v_head_dim": ANY,
    "attention.bias": ("none", "all"),
    "position.mscale": ANY,
    "position.mscale_all_dim": ANY,
}
SHARED_EXPERTS: Takes = {
    **EXPERTS,
    "moe.num_shared_experts": ANY,
    "moe.router.routed_scaling_factor": ANY,
    "moe.router.groups": ANY,
}
THEIR_SHARED = "model.layers.{layer}.mlp.shared_experts"
# Fixed in transformers' classes, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class LatentDecoder(LlamaLike):
    """A decoder with latent attention.

    The rotary rows of queries and keys are in adjacent pairs, as all readers of DeepSeek's files
    expect.
    """

    def further_reasons(self, model: ModelConfig) -> list[str]:
        reasons = shared_width_reasons(model, self.name)
        if model.attention.has_latents and model.norm.eps != LATENT_NORM_EPS:
            reasons.append(
                f"model.norm.eps is {model.norm.eps}, and {self.name} has {LATENT_NORM_EPS} in the"
                " norms of its latents"
            )
        return reasons

    def attention_links(self, model: ModelConfig) -> list[Link]:
        attention = latent(model)
        queries = RotaryRows(
            attention.num_attention_heads, attention.qk_nope_head_dim, attention.qk_rope_head_dim
        )
        # One matrix makes the latent and the shared key, of which only the key is rotated.
        keys = RotaryRows(1, attention.kv_lora_rank, attention.qk_rope_head_dim)
        kinds = ("weight", "bias")[: 1 + (attention.bias == "all")]
        plain = {
            "kv_a_norm.weight": "kv_a_layernorm.weight",
            "kv_b_proj.weight": "kv_b_proj.weight",
        } | {f"o_proj.{kind}": f"o_proj.{kind}" for kind in kinds}
        rotated_queries = "q_proj.weight"
        if attention.q_lora_rank is not None:
            rotated_queries = "q_b_proj.weight"
            plain |= {"q_a_norm.weight": "q_a_layernorm.weight"} | {
                f"q_a_proj.{kind}": f"q_a_proj.{kind}" for kind in kinds
            }
        layers = range(model.num_hidden_layers)
        return [
            *expand(_in_attention(plain), layers),
            *expand(_in_attention({rotated_queries: rotated_queries}), layers, heads=queries),
            *expand(
                _in_attention(
                    {f"kv_a_proj.{kind}": f"kv_a_proj_with_mqa.{kind}" for kind in kinds}
                ),
                layers,
                heads=keys,
            ),
        ]

    def moe_links(self, model: ModelConfig) -> Links:
        shared = (
            shared_links(model, THEIR_SHARED)
            if routed(model).num_shared_experts
            else absent_shared_experts(model, THEIR_SHARED)
        )
        return [*super().moe_links(model), *shared]

    def attention_config(self, model: ModelConfig) -> JsonObject:
        attention = latent(model)
        sizes = (
            "q_lora_rank",
            "kv_lora_rank",
            "qk_rope_head_dim",
            "qk_nope_head_dim",
            "v_head_dim",
        )
        return {
            # Latent attention has no groups, but readers of the config expect the field.
            "num_key_value_heads": attention.num_attention_heads,
            **{size: getattr(attention, size) for size in sizes},
            "attention_bias": attention.bias == "all",
        }

    def model_section(self, config: Mapping[str, Any]) -> JsonObject:
        sizes = (
            "num_attention_heads",
            "kv_lora_rank",
            "qk_rope_head_dim",
            "qk_nope_head_dim",
            "v_head_dim",
        )
        ranks = {size: config[size] for size in sizes} | {"q_lora_rank": config.get("q_lora_rank")}
        attention = {"kind": "mla", **ranks, "bias": "all" if config["attention_bias"] else "none"}
        return super().model_section(config) | {"attention": attention}


class DeepseekV2(LatentDecoder):
    """The target ``DeepseekV2ForCausalLM``, whose groups are chosen by their best expert."""

    name = "deepseek_v2"
    architecture = "DeepseekV2ForCausalLM"
    order = 10
    moe_layers = "prefix"
    takes: ClassVar[Takes] = {
        **TRUNK,
        **LATENT,
        **SHARED_EXPERTS,
        "moe.router.kind": ("softmax_topk",),
        "moe.router.norm_topk_prob": (False,),
    }

    def further_reasons(self, model: ModelConfig) -> list[str]:
        reasons = super().further_reasons(model)
        groups = None if model.routing is None else model.routing.router.groups
        if groups is not None and groups.score != "max":
            reasons.append(
                "model.moe.router.groups.score is top2_sum, and deepseek_v2 chooses groups by their"
                " best expert"
            )
        if model.hidden_size % model.attention.num_attention_heads:
            reasons.append("model.hidden_size is no multiple of the heads, as deepseek_v2 asks for")
        return reasons

    def config(self, model: ModelConfig, eod_id: int) -> JsonObject:
        groups = routed(model).router.groups
        return {
            **super().config(model, eod_id),
            **prefix_config(model),
            "topk_method": "greedy" if groups is None else "group_limited_greedy",
            "n_group": None if groups is None else groups.num_groups,
            "topk_group": None if groups is None else groups.top_k_groups,
            "mlp_bias": False,
            "norm_topk_prob": False,
        }

    def unread(self, config: Mapping[str, Any]) -> set[str]:
        of_groups = {"n_group", "topk_group"} if config.get("topk_method") == "greedy" else set()
        # The class never renormalises, so that only a config that asks for it is refused.
        return (
            super().unread(config)
            | of_groups
            | ({"norm_topk_prob"} if not config.get("norm_topk_prob") else set())
        )

    def model_section(self, config: Mapping[str, Any]) -> JsonObject:
        router = {
            "kind": "softmax_topk",
            "norm_topk_prob": False,
            "routed_scaling_factor": config["routed_scaling_factor"],
        }
        if config["topk_method"] == "group_limited_greedy":
            router["groups"] = {
                "num_groups": config["n_group"],
                "top_k_groups": config["topk_group"],
                "score": "max",
            }
        return super().model_section(config) | prefix_experts(config, router)


def shared_width_reasons(model: ModelConfig, name: str) -> list[str]:
    """A reason if the shared experts have a width that no number of DeepSeek's has."""
    if model.moe is not None and model.moe.shared_width % model.moe.moe_intermediate_size:
        return [
            f"the shared experts are {model.moe.shared_width} wide, and {name}'s a multiple of"
            " moe_intermediate_size"
        ]
    return []


def prefix_config(model: ModelConfig) -> JsonObject:
    """The fields about experts that all of DeepSeek's configs share."""
    moe = routed(model)
    return {
        "first_k_dense_replace": model.num_hidden_layers - len(model.moe_layers),
        "n_routed_experts": moe.num_experts,
        # A count, from which transformers computes the width of the joint expert.
        "n_shared_experts": moe.shared_width // moe.moe_intermediate_size,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "routed_scaling_factor": moe.router.routed_scaling_factor,
    }


def prefix_experts(config: Mapping[str, Any], router: JsonObject) -> JsonObject:
    """Layer pattern and MoE section of DeepSeek's configs."""
    moe = {
        "kind": "dropless",
        "num_experts": config["n_routed_experts"],
        "top_k": config["num_experts_per_tok"],
        "moe_intermediate_size": config["moe_intermediate_size"],
        "num_shared_experts": config.get("n_shared_experts") or 0,
        "router": router,
    }
    return {
        "layer_pattern": {"kind": "first_k_dense", "k": config["first_k_dense_replace"]},
        "moe": moe,
    }


def groups_of(count: int | None, kept: int | None, score: str) -> JsonObject | None:
    """A router's groups of experts; a single group is the same as no groups."""
    return (
        None if count in (None, 1) else {"num_groups": count, "top_k_groups": kept, "score": score}
    )


def _in_attention(names: dict[str, str]) -> dict[str, str]:
    return {
        f"layers.{{layer}}.attention.{ours}": f"model.layers.{{layer}}.self_attn.{theirs}"
        for ours, theirs in names.items()
    }
