"""The architecture ``qwen2_moe``: softmax routing, a gated shared expert, dense layers anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pretrain.core.files import JsonObject
from pretrain.export.architectures.llama_like import (
    GROUPED_QUERY,
    SHARED,
    SOFTMAX,
    TRUNK,
    LlamaLike,
    absent_shared_experts,
    expert_layers,
    router_aux_loss_coef,
    shared_links,
    sparse_layers,
)
from pretrain.export.architectures.qwen3_moe import qwen_experts
from pretrain.export.architectures.sections import grouped_query, routed
from pretrain.export.features import ANY, Takes
from pretrain.export.name_map import Links, Zeros, expand
from pretrain.model.config import ModelConfig

THEIR_SHARED = "model.layers.{layer}.mlp.shared_expert"


class Qwen2Moe(LlamaLike):
    """The target ``Qwen2MoeForCausalLM``.

    Its shared expert is always multiplied by sigmoid(w x). A shared expert without a gate gets w =
    0 and its last matrix doubled, as 2 x 0.5 is exact. A model without shared experts gets one of
    width zero.
    """

    name = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    order = 7
    moe_layers = "any"
    takes: ClassVar[Takes] = {
        **TRUNK,
        **GROUPED_QUERY,
        **SOFTMAX,
        "attention.bias": ("none", "qkv"),
        "moe.num_shared_experts": ANY,
        "moe.shared_expert_gate": ANY,
    }

    def moe_links(self, model: ModelConfig) -> Links:
        moe = routed(model)
        gates: Links = [
            Zeros(THEIR_SHARED.format(layer=layer) + "_gate.weight", (1, model.hidden_size))
            for layer in model.moe_layers
        ]
        if not moe.num_shared_experts:
            return [*super().moe_links(model), *absent_shared_experts(model, THEIR_SHARED), *gates]
        if moe.shared_expert_gate:
            gates = [
                *expand({f"{SHARED}gate.weight": f"{THEIR_SHARED}_gate.weight"}, model.moe_layers)
            ]
        shared = shared_links(
            model, THEIR_SHARED, down_scale=1.0 if moe.shared_expert_gate else 2.0
        )
        return [*super().moe_links(model), *shared, *gates]

    def config(self, model: ModelConfig, eod_id: int) -> JsonObject:
        attention = grouped_query(model)
        moe = routed(model)
        return {
            **super().config(model, eod_id),
            "qkv_bias": attention.bias == "qkv",
            "use_sliding_window": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [
                index for index in range(model.num_hidden_layers) if index not in model.moe_layers
            ],
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.moe_intermediate_size,
            "shared_expert_intermediate_size": moe.shared_width,
            "norm_topk_prob": moe.router.norm_topk_prob,
            "router_aux_loss_coef": router_aux_loss_coef(model),
        }

    def model_section(self, config: Mapping[str, Any]) -> JsonObject:
        section = super().model_section(config)
        section["attention"]["bias"] = "qkv" if config["qkv_bias"] else "none"
        width = config["shared_expert_intermediate_size"]
        shared = (
            {"num_shared_experts": 1, "shared_intermediate_size": width, "shared_expert_gate": True}
            if width
            else {}
        )
        return section | {
            "layer_pattern": sparse_layers(config),
            "moe": qwen_experts(config, expert_layers(config)) | shared,
        }
