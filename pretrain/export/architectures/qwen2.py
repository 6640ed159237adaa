"""The architecture ``qwen2``: dense, with biases of queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pretrain.core.files import JsonObject
from pretrain.export.architectures.llama_like import (
    GROUPED_QUERY,
    TRUNK,
    LlamaLike,
    window_section,
    windowed_layers,
)
from pretrain.export.features import ANY, Takes
from pretrain.model.config import ModelConfig

WINDOWED: Takes = {"attention.sliding_window": ANY, "attention.full_attention_every": ANY}


class Qwen2(LlamaLike):
    """The target ``Qwen2ForCausalLM``, which always has these biases."""

    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    order = 4
    moe_layers = "none"
    takes: ClassVar[Takes] = {**TRUNK, **GROUPED_QUERY, **WINDOWED, "attention.bias": ("qkv",)}

    def config(self, model: ModelConfig, eod_id: int) -> JsonObject:
        return {**super().config(model, eod_id), **window_fields(model)}

    def model_section(self, config: Mapping[str, Any]) -> JsonObject:
        section = super().model_section(config)
        section["attention"] |= {"bias": "qkv", **window_section(config)}
        return section


def window_fields(model: ModelConfig) -> JsonObject:
    """Qwen's fields about windows.

    ``max_window_layers`` is for releases without ``layer_types``: the first layer with a window.
    """
    types = windowed_layers(model)["layer_types"]
    first = types.index("sliding_attention") if "sliding_attention" in types else len(types)
    return {
        **windowed_layers(model),
        "use_sliding_window": "sliding_attention" in types,
        "max_window_layers": first,
    }
