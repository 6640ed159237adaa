"""Which parameters share a learning rate and a weight decay, and which of them are experts."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import nn

from pretrain.core.errors import ConfigError
from pretrain.model.config import ModelConfig
from pretrain.model.moe.config import Role
from pretrain.optim.config import Optimizer
from pretrain.optim.matrix_shards import MatrixOptimizer

# A group of ``torch.optim``: ``params``, ``lr``, ``weight_decay``, and keys that an optimizer or
# DeepSpeed adds (``betas``, ``moe``, ``name``, ``rule`` ...).
ParamGroup: TypeAlias = dict[str, Any]


def parameter_role(name: str, parameter: torch.Tensor, model: ModelConfig) -> str:
    """``embedding``, ``router``, ``vector`` (norms, biases, attention sinks) or ``matrix``."""
    # Not decayed: rows of rare tokens would shrink in the many steps without a gradient.
    if name.startswith(("embedding.", "position.")):
        return "embedding"
    role = model.moe_role(name)
    # Stacked biases have two dimensions, and each of their rows is a vector. Of a parameter that
    # ZeRO 3 has partitioned, the shape has another name.
    if len(getattr(parameter, "ds_shape", parameter.shape)) == 1 or role is Role.EXPERT_BIAS:
        return "vector"
    return "router" if role is Role.ROUTER else "matrix"


def is_hidden_matrix(name: str, parameter: torch.Tensor, model: ModelConfig) -> bool:
    """Whether it is a matrix inside the blocks, or a stack of them, which Muon orthogonalises."""
    role = model.moe_role(name)
    return (
        parameter_role(name, parameter, model) == "matrix"
        and not name.startswith("head.")
        and not (role is not None and role.is_gate)
    )


def peak_learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The peak learning rate of each role."""
    return {
        "embedding": optimizer.embedding_learning_rate or optimizer.learning_rate,
        "router": optimizer.router_learning_rate or optimizer.learning_rate,
        "vector": optimizer.learning_rate,
        "matrix": optimizer.learning_rate,
    }


def learning_rate_scale(group: ParamGroup) -> float:
    """The factor of the peak learning rate of a group's role.

    1 except for parameters that are wider than at muP's base.
    """
    return float(group.get("learning_rate_scale", 1.0))


def parameter_groups(
    model: nn.Module, config: ModelConfig, optimizer: Optimizer
) -> list[ParamGroup]:
    """Optimizer groups by role, with experts in separate groups.

    Parameters with a ``learning_rate_scale`` (:mod:`pretrain.model.mup`) or another ``rule`` of the
    optimizer are in separate groups too. DeepSpeed wants the groups of expert parameters marked
    with ``moe`` and named after their expert-parallel group (the name that its layer wrote on the
    parameter); otherwise it would average the gradients of different experts. Vectors and
    embeddings are not decayed. The learning rate is 0 until the first step sets it by role and
    scale.

    Args:
        config: of ``model``.
    """
    groups: dict[tuple[str, str | None, float, str | None], ParamGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = parameter_role(name, parameter, config)
        expert_group: str | None = None
        if not getattr(parameter, "allreduce", True):
            # DeepSpeed's attribute; mypy does not know it on a Parameter.
            expert_group = getattr(parameter, "group_name")  # noqa: B009
        scale: float = getattr(parameter, "learning_rate_scale", 1.0)
        rule = optimizer.rule_for(is_hidden_matrix(name, parameter, config))
        key = role, expert_group, scale, rule
        # Dictionaries keep their order, so groups, and with them checkpoints, are in the model's
        # order.
        if key not in groups:
            # Divided by the scale, so that learning rate times decay does not depend on it.
            decay = 0.0 if role in ("embedding", "vector") else optimizer.weight_decay / scale
            group: ParamGroup = {
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


def build_optimizer(groups: list[ParamGroup], config: Optimizer) -> torch.optim.Optimizer:
    """The recipe's optimizer over ``groups``.

    Raises:
        ConfigError: if it needs whole matrices and is not built for ZeRO's flat partitions.
    """
    optimizer: torch.optim.Optimizer = config.implementing_class()(groups, config)
    # At ZeRO 1 to 3 a parameter is a flat piece of many tensors: without a matrix' shape such a
    # rule would train, and compute something else.
    if config.needs_whole_matrices and not isinstance(optimizer, MatrixOptimizer):
        raise ConfigError(
            f"optimizer.kind={config.kind} needs whole matrices, but {type(optimizer).__name__} is no"
            " MatrixOptimizer (pretrain.optim.matrix_shards), to which ZeRO gives them: derive from it"
        )
    return optimizer
