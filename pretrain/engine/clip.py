"""The true global gradient norm and clipping for ZeRO stage 0, where DeepSpeed's own is wrong.

DeepSpeed 0.19.8 averages the ranks' local norms there. With experts spread over ranks these differ, and the average of square roots is
not the square root of the sum: the clip factor then depends on ep_size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import distributed


def global_grad_norm(
    parameters: Iterable[torch.nn.Parameter], expert_group: distributed.ProcessGroup | None
) -> torch.Tensor:
    """L2 norm over all parameters of the whole model, each expert counted once; fp32 scalar, the same on every rank.

    Args:
        parameters: with reduced gradients; experts are those marked ``allreduce = False``.
        expert_group: the ranks that share one set of experts; None where this rank holds them all.
    """
    dense: list[torch.Tensor] = []
    experts: list[torch.Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            squared = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
            (dense if getattr(parameter, "allreduce", True) else experts).append(squared)
    dense_squared = torch.stack(dense).sum()
    if not experts:
        return dense_squared.sqrt()
    experts_squared = torch.stack(experts).sum()
    if expert_group is not None:
        distributed.all_reduce(experts_squared, group=expert_group)
    return (dense_squared + experts_squared).sqrt()


def clip_gradients(
    parameters: Iterable[torch.nn.Parameter], norm: torch.Tensor, max_norm: float
) -> None:
    """Scales all gradients by min(1, max_norm / (norm + 1e-6)), the factor that ZeRO uses; not at all where the norm is not finite."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    factor = torch.where(norm.isfinite(), factor, torch.ones_like(factor))
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.dtype))
