"""The architecture ``qwen3``: dense, with norms of each head's queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pretrain.core.files import JsonObject
from pretrain.export.architectures.llama_like import GROUPED_QUERY, TRUNK, LlamaLike, window_section
from pretrain.export.architectures.qwen2 import WINDOWED, window_fields
from pretrain.export.architectures.sections import grouped_query
from pretrain.export.features import Takes
from pretrain.model.config import ModelConfig


class Qwen3(LlamaLike):
    """The target ``Qwen3ForCausalLM`` (transformers 4.51 and later)."""

    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    order = 3
    moe_layers = "none"
    takes: ClassVar[Takes] = {
        **TRUNK,
        **GROUPED_QUERY,
        **WINDOWED,
        "attention.qk_norm": ("head",),
        "attention.bias": ("none", "all"),
    }

    def config(self, model: ModelConfig, eod_id: int) -> JsonObject:
        biased = grouped_query(model).bias == "all"
        return {**super().config(model, eod_id), **window_fields(model), "attention_bias": biased}

    def model_section(self, config: Mapping[str, Any]) -> JsonObject:
        section = super().model_section(config)
        bias = "all" if config["attention_bias"] else "none"
        section["attention"] |= {"qk_norm": "head", "bias": bias, **window_section(config)}
        return section
