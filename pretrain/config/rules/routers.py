"""Mixtures of experts that compute what they say, and learn less than one might think."""

from __future__ import annotations

from pretrain.model.config import ModelConfig


def deaf_router(model: ModelConfig) -> str | None:
    """Why the language loss has no gradient for what chooses the experts, and what to do.

    None if it has one, or if there is one expert.
    """
    moe = model.moe
    if moe is None or not model.routed_layers or moe.router_learns or moe.total_experts == 1:
        return None
    return moe.why_router_is_deaf


def router_warnings(model: ModelConfig) -> list[str]:
    """What is worth knowing before a mixture of experts is trained, a sentence each."""
    if model.moe is None or not model.routed_layers:
        return []
    deaf = deaf_router(model)
    return [*([] if deaf is None else [deaf]), *model.moe.warnings()]
