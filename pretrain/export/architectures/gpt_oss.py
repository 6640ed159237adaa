"""The architecture ``gpt_oss``: sinks, windows in some layers, clamped experts with biases.

Its experts are stacked, with gate and up projections interleaved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pretrain.core.files import JsonObject
from pretrain.export.architectures.llama_like import (
    GROUPED_QUERY,
    SOFTMAX,
    TRUNK,
    LlamaLike,
    aux_loss_weight,
    expert_names,
    router_aux_loss_coef,
    router_name,
    window_section,
    windowed_layers,
)
from pretrain.export.architectures.sections import clamped, grouped_query, routed
from pretrain.export.features import ANY, Takes
from pretrain.export.name_map import Link, Links, expand, stacked
from pretrain.model.config import ModelConfig

THEIR_MLP = "model.layers.{layer}.mlp."


class GptOss(LlamaLike):
    """The target ``GptOssForCausalLM``.

    It takes the softmax over the chosen logits, which equals the renormalised softmax over all.
    """

    name = "gpt_oss"
    architecture = "GptOssForCausalLM"
    order = 12
    moe_layers = "all"
    takes: ClassVar[Takes] = {
        **TRUNK,
        **GROUPED_QUERY,
        **SOFTMAX,
        "attention.bias": ("none", "all"),
        "attention.sinks": (True,),
        "attention.sliding_window": ANY,
        "attention.full_attention_every": ANY,
        "feed_forward.kind": ("clamped_swiglu",),
        "feed_forward.bias": (True,),
        "feed_forward.limit": ANY,
        "feed_forward.alpha": ANY,
        "moe.router.bias": (True,),
        "moe.router.norm_topk_prob": (True,),
    }

    def attention_links(self, model: ModelConfig) -> list[Link]:
        sinks = {"layers.{layer}.attention.sinks": "model.layers.{layer}.self_attn.sinks"}
        return [*super().attention_links(model), *expand(sinks, range(model.num_hidden_layers))]

    def moe_links(self, model: ModelConfig) -> Links:
        moe = routed(model)
        layers_and_experts = (model.moe_layers, moe.num_experts)
        gate, up, down = expert_names(model)
        gate_bias, up_bias, down_bias = expert_names(model, "bias")
        router = {
            f"{router_name(moe)}.{kind}": f"{THEIR_MLP}router.{kind}" for kind in ("weight", "bias")
        }
        # Gate and up projections alternate along the last dimension of one tensor.
        fused = f"{THEIR_MLP}experts.gate_up_proj"
        fused_bias = f"{THEIR_MLP}experts.gate_up_proj_bias"
        return [
            *expand(router, model.moe_layers),
            *stacked({gate: fused}, *layers_and_experts, column=0, transposed=True),
            *stacked({up: fused}, *layers_and_experts, column=1, transposed=True),
            *stacked({gate_bias: fused_bias}, *layers_and_experts, column=0),
            *stacked({up_bias: fused_bias}, *layers_and_experts, column=1),
            *stacked({down: f"{THEIR_MLP}experts.down_proj"}, *layers_and_experts, transposed=True),
            *stacked({down_bias: f"{THEIR_MLP}experts.down_proj_bias"}, *layers_and_experts),
        ]

    def config(self, model: ModelConfig, eod_id: int) -> JsonObject:
        attention = grouped_query(model)
        moe = routed(model)
        form = clamped(model)
        return {
            **super().config(model, eod_id),
            "intermediate_size": moe.moe_intermediate_size,
            "attention_bias": attention.bias == "all",
            **windowed_layers(model),
            # transformers asks for a width even if no layer has a window.
            "sliding_window": attention.sliding_window or model.max_position_embeddings,
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "swiglu_limit": form.limit,
            "swiglu_alpha": form.alpha,
            "router_aux_loss_coef": router_aux_loss_coef(model),
        }

    def model_section(self, config: Mapping[str, Any]) -> JsonObject:
        section = super().model_section(config) | {"intermediate_size": None}
        # Raises for a null: transformers asks for a width whatever the layers are.
        _ = config["sliding_window"]
        section["attention"] |= {
            "sinks": True,
            "bias": "all" if config["attention_bias"] else "none",
            **window_section(config),
        }
        return section | {
            "feed_forward": {
                "kind": "clamped_swiglu",
                "bias": True,
                "limit": config["swiglu_limit"],
                "alpha": config["swiglu_alpha"],
            },
            "moe": {
                "kind": "dropless",
                "num_experts": config["num_local_experts"],
                "top_k": config["num_experts_per_tok"],
                "moe_intermediate_size": config["intermediate_size"],
                "router": {"kind": "softmax_topk", "bias": True, "norm_topk_prob": True},
                "aux_loss_weight": aux_loss_weight(config, config["num_hidden_layers"]),
            },
        }
