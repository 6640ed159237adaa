"""The architecture ``glm4_moe``: DeepSeek-V3's experts with grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pretrain.core.files import JsonObject
from pretrain.export.architectures.deepseek_v3 import (
    SIGMOID,
    sigmoid_config,
    sigmoid_experts,
    sigmoid_links,
    sigmoid_reasons,
)
from pretrain.export.architectures.llama_like import GROUPED_QUERY, TRUNK, LlamaLike
from pretrain.export.architectures.sections import grouped_query
from pretrain.export.features import Takes
from pretrain.export.name_map import Links
from pretrain.model.config import ModelConfig


class Glm4Moe(LlamaLike):
    """The target ``Glm4MoeForCausalLM``.

    Published GLM-4.5 rotates only half of a head's dimensions, which recipes do not have.
    """

    name = "glm4_moe"
    architecture = "Glm4MoeForCausalLM"
    order = 11
    moe_layers = "prefix"
    takes: ClassVar[Takes] = {
        **TRUNK,
        **GROUPED_QUERY,
        **SIGMOID,
        "attention.bias": ("none", "qkv"),
        "attention.qk_norm": ("none", "head"),
    }

    def further_reasons(self, model: ModelConfig) -> list[str]:
        return sigmoid_reasons(model, self.name)

    def moe_links(self, model: ModelConfig) -> Links:
        return [*super().moe_links(model), *sigmoid_links(model)]

    def config(self, model: ModelConfig, eod_id: int) -> JsonObject:
        attention = grouped_query(model)
        fields = super().config(model, eod_id)
        return {
            **fields,
            **sigmoid_config(model),
            "rope_parameters": fields["rope_parameters"] | {"partial_rotary_factor": 1.0},
            "partial_rotary_factor": 1.0,
            "attention_bias": attention.bias == "qkv",
            "use_qk_norm": attention.qk_norm == "head",
        }

    def model_section(self, config: Mapping[str, Any]) -> JsonObject:
        section = super().model_section(config)
        section["attention"] |= {
            "qk_norm": "head" if config["use_qk_norm"] else "none",
            "bias": "qkv" if config["attention_bias"] else "none",
        }
        return section | sigmoid_experts(config)
