"""Which parameters share a learning rate and a weight decay, and which of them are experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretrain.config.schema import AdamWConfig, SGDConfig

ROUTER_MATRICES = (".router.gate.weight", ".router.noise.weight", ".gate.wg.weight")
EXPERT_BIASES = (".b1", ".b2", ".b3")


def parameter_role(name: str, parameter: torch.Tensor) -> str:
    """``embedding``, ``router``, ``vector`` (norms, biases, attention sinks) or ``matrix``."""
    if name.startswith(("embedding.", "position.")):
        return "embedding"
    if parameter.dim() == 1 or name.endswith(EXPERT_BIASES):
        return "vector"
    return "router" if name.endswith(ROUTER_MATRICES) or ".retrieval." in name else "matrix"


def peak_learning_rates(config: AdamWConfig | SGDConfig) -> dict[str, float]:
    """The peak learning rate of each role."""
    return {
        "embedding": config.embedding_learning_rate or config.learning_rate,
        "router": config.router_learning_rate or config.learning_rate,
        "vector": config.learning_rate,
        "matrix": config.learning_rate,
    }


def learning_rate_scale(group: dict[str, Any]) -> float:
    """What the peak learning rate of a group's role is multiplied with: 1 but for parameters that are wider than at muP's base."""
    return float(group.get("learning_rate_scale", 1.0))


def parameter_groups(model: nn.Module, config: AdamWConfig | SGDConfig) -> list[dict[str, Any]]:
    """Optimizer groups by role, experts apart, and those apart that have a ``learning_rate_scale`` of their own (:mod:`pretrain.model.width`).

    DeepSpeed wants the groups of expert parameters marked with ``moe`` and named after their expert-parallel group (the name that its
    layer wrote on the parameter); else it would average the gradients of different experts. Vectors and embeddings are not decayed. The
    learning rate is 0 until the first step sets it by role and scale; learning rate times decay does not depend on the scale.
    """
    groups: dict[tuple[str, str | None, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = parameter_role(name, parameter)
        expert_group: str | None = None if getattr(parameter, "allreduce", True) else getattr(parameter, "group_name")  # noqa: B009
        scale: float = getattr(parameter, "learning_rate_scale", 1.0)
        if (role, expert_group, scale) not in groups:
            decay = 0.0 if role in ("embedding", "vector") else config.weight_decay / scale
            group: dict[str, Any] = {"params": [], "role": role, "name": expert_group or role, "lr": 0.0, "weight_decay": decay}
            group |= {"learning_rate_scale": scale} if scale != 1.0 else {}
            groups[role, expert_group, scale] = group | ({"moe": True} if expert_group else {})
        groups[role, expert_group, scale]["params"].append(parameter)
    return list(groups.values())


def build_optimizer(groups: list[dict[str, Any]], config: AdamWConfig | SGDConfig) -> torch.optim.Optimizer:
    """torch's own optimizer over ``groups``."""
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
