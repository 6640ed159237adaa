"""The architecture ``deepseek_v3``: latent attention, sigmoid routing, balancing by bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pretrain.core.files import JsonObject
from pretrain.export.architectures.deepseek_v2 import (
    LATENT,
    SHARED_EXPERTS,
    THEIR_SHARED,
    LatentDecoder,
    groups_of,
    prefix_config,
    prefix_experts,
    shared_width_reasons,
)
from pretrain.export.architectures.llama_like import (
    TRUNK,
    absent_shared_experts,
    balance_bias_name,
    shared_links,
)
from pretrain.export.architectures.sections import routed
from pretrain.export.features import ANY, Takes
from pretrain.export.name_map import Links, Zeros, expand
from pretrain.model.config import ModelConfig

SIGMOID: Takes = {
    **SHARED_EXPERTS,
    "moe.router.kind": ("sigmoid_topk",),
    "moe.router.norm_topk_prob": ANY,
    "moe.bias_balancing": ANY,
}
THEIR_BIAS = "model.layers.{layer}.mlp.gate.e_score_correction_bias"


class DeepseekV3(LatentDecoder):
    """The target ``DeepseekV3ForCausalLM``, whose groups are chosen by their two best experts."""

    name = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    order = 9
    moe_layers = "prefix"
    takes: ClassVar[Takes] = {**TRUNK, **LATENT, **SIGMOID}

    def further_reasons(self, model: ModelConfig) -> list[str]:
        return list(
            dict.fromkeys([*super().further_reasons(model), *sigmoid_reasons(model, self.name)])
        )

    def moe_links(self, model: ModelConfig) -> Links:
        return [*super().moe_links(model), *bias_links(model)]

    def config(self, model: ModelConfig, eod_id: int) -> JsonObject:
        return {**super().config(model, eod_id), **sigmoid_config(model), "rope_interleave": True}

    def model_section(self, config: Mapping[str, Any]) -> JsonObject:
        return super().model_section(config) | sigmoid_experts(config)


def sigmoid_reasons(model: ModelConfig, name: str) -> list[str]:
    """What DeepSeek-V3's router cannot compute."""
    reasons = shared_width_reasons(model, name)
    moe = model.routing
    if moe is None:
        return reasons
    groups = moe.router.groups
    if groups is not None and groups.score != "top2_sum":
        reasons.append(
            f"model.moe.router.groups.score is max, and {name} chooses groups by their two best"
            " experts"
        )
    if moe.num_experts < 2:
        reasons.append(f"there is one expert, and {name} looks at the two best of a group")
    return reasons


def bias_links(model: ModelConfig) -> Links:
    """The balancing biases; zeros for a model that is balanced by a loss."""
    moe = routed(model)
    if moe.bias_balancing is None:
        return [
            Zeros(THEIR_BIAS.format(layer=layer), (moe.num_experts,), exact=True)
            for layer in model.moe_layers
        ]
    return [*expand({balance_bias_name(moe): THEIR_BIAS}, model.moe_layers, exact=True)]


def sigmoid_links(model: ModelConfig) -> Links:
    """Shared experts and balancing biases."""
    shared = (
        shared_links(model, THEIR_SHARED)
        if routed(model).num_shared_experts
        else absent_shared_experts(model, THEIR_SHARED)
    )
    return [*shared, *bias_links(model)]


def sigmoid_config(model: ModelConfig) -> JsonObject:
    """The fields about experts of configs with DeepSeek-V3's router."""
    router = routed(model).router
    groups = router.groups
    return {
        **prefix_config(model),
        # One group of all experts is the same as none; the class cannot take null.
        "n_group": 1 if groups is None else groups.num_groups,
        "topk_group": 1 if groups is None else groups.top_k_groups,
        "norm_topk_prob": router.norm_topk_prob,
        # What llama.cpp's and DeepSeek's own code call this router.
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        # The block of multi-token prediction is not exported.
        "num_nextn_predict_layers": 0,
    }


def sigmoid_experts(config: Mapping[str, Any]) -> JsonObject:
    """Layer pattern and MoE section of such a config."""
    router = {
        "kind": "sigmoid_topk",
        "norm_topk_prob": config["norm_topk_prob"],
        "routed_scaling_factor": config["routed_scaling_factor"],
        "groups": groups_of(config.get("n_group"), config.get("topk_group"), "top2_sum"),
    }
    section = prefix_experts(config, router)
    # Always: the class has the bias, even if it is zero.
    section["moe"]["bias_balancing"] = {}
    return section
