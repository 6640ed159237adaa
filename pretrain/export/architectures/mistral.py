"""The architecture ``mistral``: Llama with a sliding window in every layer or in none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pretrain.core.files import JsonObject
from pretrain.export.architectures.llama_like import GROUPED_QUERY, TRUNK, LlamaLike
from pretrain.export.features import ANY, Takes
from pretrain.model.config import ModelConfig


class Mistral(LlamaLike):
    """The target ``MistralForCausalLM``."""

    name = "mistral"
    architecture = "MistralForCausalLM"
    order = 2
    moe_layers = "none"
    takes: ClassVar[Takes] = {**TRUNK, **GROUPED_QUERY, "attention.sliding_window": ANY}

    def config(self, model: ModelConfig, eod_id: int) -> JsonObject:
        return {**super().config(model, eod_id), "sliding_window": model.attention.sliding_window}

    def model_section(self, config: Mapping[str, Any]) -> JsonObject:
        section = super().model_section(config)
        section["attention"]["sliding_window"] = config.get("sliding_window")
        return section
