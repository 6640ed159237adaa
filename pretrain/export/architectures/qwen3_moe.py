"""The architecture ``qwen3_moe``: softmax routing, QK-norm, no shared experts."""

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
    expert_layers,
    router_aux_loss_coef,
    sparse_layers,
)
from pretrain.export.architectures.sections import grouped_query, routed
from pretrain.export.features import Takes
from pretrain.model.config import ModelConfig


class Qwen3Moe(LlamaLike):
    """The target ``Qwen3MoeForCausalLM`` (transformers 4.51 and later); QK-norm is always on."""

    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    order = 6
    moe_layers = "any"
    takes: ClassVar[Takes] = {
        **TRUNK,
        **GROUPED_QUERY,
        **SOFTMAX,
        "attention.qk_norm": ("head",),
        "attention.bias": ("none", "all"),
    }

    def config(self, model: ModelConfig, eod_id: int) -> JsonObject:
        attention = grouped_query(model)
        moe = routed(model)
        return {
            **super().config(model, eod_id),
            "attention_bias": attention.bias == "all",
            "use_sliding_window": False,
            # A list of layers covers every pattern; decoder_sparse_step only the regular ones.
            "decoder_sparse_step": 1,
            "mlp_only_layers": [
                index for index in range(model.num_hidden_layers) if index not in model.moe_layers
            ],
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.moe_intermediate_size,
            "norm_topk_prob": moe.router.norm_topk_prob,
            "router_aux_loss_coef": router_aux_loss_coef(model),
        }

    def model_section(self, config: Mapping[str, Any]) -> JsonObject:
        section = super().model_section(config)
        section["attention"] |= {
            "qk_norm": "head",
            "bias": "all" if config["attention_bias"] else "none",
        }
        return section | {
            "layer_pattern": sparse_layers(config),
            "moe": qwen_experts(config, expert_layers(config)),
        }


def qwen_experts(
    config: Mapping[str, Any], moe_layers: int, width: str = "moe_intermediate_size"
) -> JsonObject:
    """A recipe's MoE section from the fields that Qwen's and AllenAI's configs share.

    ``moe_layers`` is the number of layers with experts, which the loss weight depends on.
    """
    return {
        "kind": "dropless",
        "num_experts": config["num_experts"],
        "top_k": config["num_experts_per_tok"],
        "moe_intermediate_size": config[width],
        "router": {"kind": "softmax_topk", "norm_topk_prob": config["norm_topk_prob"]},
        "aux_loss_weight": aux_loss_weight(config, moe_layers),
    }
