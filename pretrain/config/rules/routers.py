"""Warnings about mixtures of experts that run, and learn less than one might expect."""

from __future__ import annotations

from pretrain.model.config import ModelConfig


def deaf_router(model: ModelConfig) -> str | None:
    """Return why the language loss has no gradient for the router, and what to do about it.

    None if it has one, or if there is one expert.
    """
    # With one expert there is nothing to choose, and so nothing to learn.
    moe = model.moe
    if moe is None or not model.routed_layers or moe.router_learns or moe.total_experts == 1:
        return None
    return moe.why_router_is_deaf


def router_warnings(model: ModelConfig) -> list[str]:
    """Return what is worth knowing before a mixture of experts is trained, a sentence each."""
    if model.moe is None or not model.routed_layers:
        return []
    deaf = deaf_router(model)
    return [*([] if deaf is None else [deaf]), *model.moe.warnings()]
