"""The architecture ``olmoe``: experts in every layer, QK-norm over all heads together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pretrain.core.files import JsonObject
from pretrain.export.architectures.llama_like import (
    GROUPED_QUERY,
    SOFTMAX,
    TRUNK,
    LlamaLike,
    router_aux_loss_coef,
)
from pretrain.export.architectures.qwen3_moe import qwen_experts
from pretrain.export.architectures.sections import grouped_query, routed
from pretrain.export.features import Takes
from pretrain.model.config import ModelConfig


class Olmoe(LlamaLike):
    """The target ``OlmoeForCausalLM``."""

    name = "olmoe"
    architecture = "OlmoeForCausalLM"
    order = 8
    moe_layers = "all"
    takes: ClassVar[Takes] = {
        **TRUNK,
        **GROUPED_QUERY,
        **SOFTMAX,
        "attention.qk_norm": ("full",),
        "attention.bias": ("none", "all"),
    }

    def further_reasons(self, model: ModelConfig) -> list[str]:
        attention = model.attention
        if not attention.has_latents and attention.score_dim != model.hidden_size:
            return [
                f"model.attention.head_dim ({attention.query_width}) is not hidden_size / heads,"
                " which olmoe's norms of queries and keys go by"
            ]
        return []

    def config(self, model: ModelConfig, eod_id: int) -> JsonObject:
        attention = grouped_query(model)
        moe = routed(model)
        fields = super().config(model, eod_id)
        # transformers' class has no such field: it computes hidden_size / heads.
        del fields["head_dim"]
        return {
            **fields,
            "intermediate_size": moe.moe_intermediate_size,
            "attention_bias": attention.bias == "all",
            "clip_qkv": None,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": moe.router.norm_topk_prob,
            "router_aux_loss_coef": router_aux_loss_coef(model),
        }

    def model_section(self, config: Mapping[str, Any]) -> JsonObject:
        # OLMoE calls the experts' width intermediate_size; there are no dense layers.
        section = super().model_section(config) | {"intermediate_size": None}
        section["attention"] |= {
            "qk_norm": "full",
            "bias": "all" if config["attention_bias"] else "none",
        }
        return section | {
            "moe": qwen_experts(config, config["num_hidden_layers"], "intermediate_size")
        }
