"""Which parameters share a learning rate and a weight decay, and which of them are experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretrain.optim.config import Muon, Optimizer

ROUTER_MATRICES = (".router.gate.weight", ".router.noise.weight", ".gate.wg.weight")
EXPERT_BIASES = (".b1", ".b2", ".b3")
# Of few rows, each a gate by itself: there is nothing to make orthogonal.
GATES = (".shared.gate.weight", ".coefficient.weight")


def parameter_role(name: str, parameter: torch.Tensor) -> str:
    """``embedding``, ``router``, ``vector`` (norms, biases, attention sinks) or ``matrix``."""
    if name.startswith(("embedding.", "position.")):
        return "embedding"
    if parameter.dim() == 1 or name.endswith(EXPERT_BIASES):
        return "vector"
    return "router" if name.endswith(ROUTER_MATRICES) or ".retrieval." in name else "matrix"


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon trains it: a matrix, or a stack of them, inside the blocks."""
    return (
        parameter_role(name, parameter) == "matrix"
        and not name.startswith("head.")
        and not name.endswith(GATES)
    )


def peak_learning_rates(config: Optimizer) -> dict[str, float]:
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


def parameter_groups(model: nn.Module, config: Optimizer) -> list[dict[str, Any]]:
    """Optimizer groups by role, experts apart, and those apart that have a ``learning_rate_scale`` of their own (:mod:`pretrain.model.mup`);
    for Muon also by the ``rule`` that trains them, ``muon`` or ``adamw``.

    DeepSpeed wants the groups of expert parameters marked with ``moe`` and named after their expert-parallel group (the name that its
    layer wrote on the parameter); else it would average the gradients of different experts. Vectors and embeddings are not decayed. The
    learning rate is 0 until the first step sets it by role and scale; learning rate times decay does not depend on the scale.
    """
    groups: dict[tuple[str, str | None, float, str | None], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = parameter_role(name, parameter)
        expert_group: str | None = (
            None if getattr(parameter, "allreduce", True) else getattr(parameter, "group_name")  # noqa: B009
        )
        scale: float = getattr(parameter, "learning_rate_scale", 1.0)
        rule = (
            ("muon" if is_hidden_matrix(name, parameter) else "adamw")
            if isinstance(config, Muon)
            else None
        )
        key = role, expert_group, scale, rule
        if key not in groups:
            decay = 0.0 if role in ("embedding", "vector") else config.weight_decay / scale
            group: dict[str, Any] = {
                "params": [],
                "role": role,
                "name": expert_group or role,
                "lr": 0.0,
                "weight_decay": decay,
            }
            group |= {"learning_rate_scale": scale} if scale != 1.0 else {}
            groups[key] = (
                group | ({"moe": True} if expert_group else {}) | ({"rule": rule} if rule else {})
            )
        groups[key]["params"].append(parameter)
    return list(groups.values())


def build_optimizer(groups: list[dict[str, Any]], config: Optimizer) -> torch.optim.Optimizer:
    """The recipe's optimizer over ``groups``."""
    optimizer: torch.optim.Optimizer = config.implementing_class()(groups, config)
    return optimizer
