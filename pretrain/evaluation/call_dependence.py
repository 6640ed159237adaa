"""Models in which a token's logits depend on all tokens of a call, not only on earlier ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.model.config import ModelConfig
from pretrain.model.moe.config.deepspeed_native import DROPS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def call_dependence(model: ModelConfig) -> str | None:
    """Why the results of a model depend on how tokens are batched; None if they do not.

    Nothing is changed about it: drops are part of what the recipe computes, and exports compute the
    same.
    """
    return model.moe.call_dependence if model.moe is not None and model.moe_layers else None


def call_dependence_of_export(config: PreTrainedConfig) -> str | None:
    """As :func:`call_dependence`, for a Hugging Face config, of which only ours can drop tokens."""
    moe = getattr(config, "moe", None)
    return DROPS if isinstance(moe, dict) and moe.get("drop_tokens") else None
