"""The architecture ``mixtral``: experts in every layer, renormalised softmax routing."""

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
    router_aux_loss_coef,
)
from pretrain.export.architectures.sections import routed
from pretrain.export.features import ANY, Takes
from pretrain.model.config import ModelConfig


class Mixtral(LlamaLike):
    """The target ``MixtralForCausalLM``; every layer has a sliding window, or none has."""

    name = "mixtral"
    architecture = "MixtralForCausalLM"
    order = 5
    moe_layers = "all"
    # w3 is the up projection, w2 the down projection.
    moe = "block_sparse_moe"
    expert = ("w1", "w3", "w2")
    takes: ClassVar[Takes] = {
        **TRUNK,
        **GROUPED_QUERY,
        **SOFTMAX,
        "moe.router.norm_topk_prob": (True,),
        "attention.sliding_window": ANY,
    }

    def config(self, model: ModelConfig, eod_id: int) -> JsonObject:
        moe = routed(model)
        return {
            **super().config(model, eod_id),
            "intermediate_size": moe.moe_intermediate_size,
            "sliding_window": model.attention.sliding_window,
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": router_aux_loss_coef(model),
        }

    def model_section(self, config: Mapping[str, Any]) -> JsonObject:
        # Mixtral calls the experts' width intermediate_size; there are no dense layers.
        section = super().model_section(config) | {"intermediate_size": None}
        section["attention"]["sliding_window"] = config.get("sliding_window")
        moe = {
            "num_experts": config["num_local_experts"],
            "top_k": config["num_experts_per_tok"],
            "moe_intermediate_size": config["intermediate_size"],
            "router": {"norm_topk_prob": True},
        }
        return section | {
            "moe": {
                "kind": "dropless",
                **moe,
                "aux_loss_weight": aux_loss_weight(config, config["num_hidden_layers"]),
            }
        }
