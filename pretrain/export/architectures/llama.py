"""Our dense decoder as transformers' ``llama``, which everything reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pretrain.core.files import JsonObject
from pretrain.export.architectures.llama_like import GROUPED_QUERY, TRUNK, LlamaLike
from pretrain.export.architectures.sections import grouped_query
from pretrain.export.features import Takes
from pretrain.model.config import ModelConfig


class Llama(LlamaLike):
    """The target ``LlamaForCausalLM``: dense layers only.

    Biases are in all of attention or in all of the feed-forwards, or nowhere.
    """

    name = "llama"
    architecture = "LlamaForCausalLM"
    order = 1
    moe_layers = "none"
    takes: ClassVar[Takes] = {
        **TRUNK,
        **GROUPED_QUERY,
        "attention.bias": ("none", "all"),
        "feed_forward.bias": (False, True),
    }

    def further_reasons(self, model: ModelConfig) -> list[str]:
        if model.hidden_size % model.attention.num_attention_heads:
            return [
                f"model.hidden_size ({model.hidden_size}) is no multiple of the heads"
                f" ({model.attention.num_attention_heads}), as llama asks for"
            ]
        return []

    def config(self, model: ModelConfig, eod_id: int) -> JsonObject:
        return {
            **super().config(model, eod_id),
            "attention_bias": grouped_query(model).bias == "all",
            "mlp_bias": model.feed_forward.bias,
        }

    def model_section(self, config: Mapping[str, Any]) -> JsonObject:
        section = super().model_section(config)
        section["attention"]["bias"] = "all" if config["attention_bias"] else "none"
        return section | {"feed_forward": {"kind": "swiglu", "bias": config["mlp_bias"]}}
