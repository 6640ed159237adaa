"""Models in which a token's logits depend on more than the tokens before it: on all that one call computes together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.model.config import ModelConfig
from pretrain.model.moe.config import DeepSpeedMoE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DROPS = (
    "the model drops tokens (model.moe.drop_tokens=true): an expert has room for a share of the tokens of one call, so that logits depend on "
    "the batch and on the length of the call, and a cache, which computes token by token, drops fewer than a pass over the whole text"
)
DRAWS = "the model draws second experts at random in evaluation too (model.moe.top2_2nd_expert_sampling=true): each call gives other logits"


def call_dependence(model: ModelConfig) -> str | None:
    """Why the results of a model depend on how tokens are batched; None if they do not.

    Nothing is changed about it: drops are part of what the recipe computes, and exports compute the same.
    """
    moe = model.moe
    if not isinstance(moe, DeepSpeedMoE) or not model.moe_layers or not moe.depends_on_the_call:
        return None
    return DROPS if moe.drop_tokens else DRAWS


def call_dependence_of_export(config: PreTrainedConfig) -> str | None:
    """As :func:`call_dependence`, of a Hugging Face folder's configuration: only our own class can drop tokens."""
    moe = getattr(config, "moe", None)
    return DROPS if isinstance(moe, dict) and moe.get("drop_tokens") else None
