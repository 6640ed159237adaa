"""Mixtures of experts that compute what they say, and learn less than one might think: a sentence for each."""

from __future__ import annotations

from pretrain.model.config import ModelConfig
from pretrain.model.moe.config import PEER, RoutedMoE, norm_is_by_default


def deaf_router(model: ModelConfig) -> str | None:
    """Why the language loss has no gradient for what chooses the experts, and what to do; None if it has one, or there is one expert."""
    moe = model.moe
    if moe is None or not model.routed_layers or moe.router_learns or moe.total_experts == 1:
        return None
    if isinstance(moe, PEER):
        return (
            "model.moe.top_k=1 lets the keys and queries of model.moe.kind=peer learn nothing: the softmax over a head's one expert is "
            "always 1, so that the language loss has no gradient for them; set model.moe.top_k=2 or more"
        )
    return (
        "model.moe.router.norm_topk_prob=true with top_k=1 lets the router learn nothing from the language loss: one weight divided by "
        "itself is always 1; set model.moe.router.norm_topk_prob=false, or top_k=2 or more"
    )


def router_warnings(model: ModelConfig) -> list[str]:
    """What is worth knowing before a mixture of experts is trained."""
    moe = model.moe
    if moe is None or not model.routed_layers:
        return []
    found = [deaf] if (deaf := deaf_router(model)) is not None else []
    if moe.shared_expert_gate and not moe.shared_width:
        found.append(
            "model.moe.shared_expert_gate=true does nothing without shared experts: set model.moe.num_shared_experts, or leave it out"
        )
    if not isinstance(moe, RoutedMoE):
        return found
    if moe.top_k == 1 and not moe.router.norm_topk_prob and norm_is_by_default(moe.router):
        found.append(
            "model.moe.router.norm_topk_prob is false because top_k is 1: one weight divided by itself would always be 1, and the router "
            "would learn nothing from the language loss; the expert's output is multiplied by its score"
        )
    if moe.top_k == moe.num_experts:
        found += _nothing_to_balance(moe)
    return found


def _nothing_to_balance(moe: RoutedMoE) -> list[str]:
    asked = [name for name in ("aux_loss_weight", "sequence_loss_weight") if getattr(moe, name)]
    asked += ["bias_balancing"] if moe.bias_balancing is not None else []
    if not asked:
        return []
    return [
        f"model.moe.top_k ({moe.top_k}) is num_experts: every token chooses all experts, and {' and '.join(asked)} "
        f"{'have' if len(asked) > 1 else 'has'} nothing to balance; leave {'them' if len(asked) > 1 else 'it'} out, or lower top_k"
    ]
