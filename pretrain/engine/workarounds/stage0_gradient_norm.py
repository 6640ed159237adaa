"""The global gradient norm and clipping at ZeRO stage 0.

Fact: at stage 0 DeepSpeed averages the ranks' local gradient norms. With experts spread over ranks
    these differ, and the average of square roots is not the square root of the sum.
Versions: 0.19.8
Upstream: none known
Effect: the clip factor, and with it the training, would depend on ep_size.
Test: tests/integration/distributed/test_same_numbers_everywhere.py fails without it; none shows
    that DeepSpeed has changed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import distributed, nn

from pretrain.engine.loss_scale import LossScale
from pretrain.engine.step_hooks import StepHook
from pretrain.engine.workarounds.update_veto import UpdateVeto


def global_grad_norm(
    parameters: Iterable[nn.Parameter], expert_group: distributed.ProcessGroup | None
) -> torch.Tensor:
    """L2 norm over all parameters of the whole model, each expert counted once.

    [] fp32, the same on every rank.

    Args:
        parameters: with reduced gradients; experts are those marked ``allreduce = False``.
        expert_group: the ranks that share one set of experts; None if this rank has them all.
    """
    dense: list[torch.Tensor] = []
    experts: list[torch.Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            # Summed in fp32: squares of fp16 gradients overflow, and those of small ones vanish.
            squared = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
            (dense if getattr(parameter, "allreduce", True) else experts).append(squared)
    dense_squared = torch.stack(dense).sum()
    if not experts:
        return dense_squared.sqrt()
    experts_squared = torch.stack(experts).sum()
    if expert_group is not None:
        # Squares add up over ranks, norms do not.
        distributed.all_reduce(experts_squared, group=expert_group)
    return (dense_squared + experts_squared).sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), the factor that ZeRO uses.

    They are unchanged if the norm is not finite: a factor of 0 would make an infinite gradient NaN.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    # No ``if``: reading the norm on the host would synchronise once more.
    factor = torch.where(norm.isfinite(), factor, torch.ones_like(factor))
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.dtype))


@dataclass
class Stage0Clipping(StepHook):
    """Clips by the true norm, and asks the veto, between backward pass and update.

    Attributes:
        max_norm: of the gradient; 0 for no clipping.
        tables_norm: norm of what DeepSpeed does not train in this step, [] fp32.
        norm: of the last step before clipping, on the device.
    """

    model: nn.Module
    expert_group: distributed.ProcessGroup | None
    max_norm: float
    precision: str
    loss_scale: LossScale
    veto: UpdateVeto
    tables_norm: Callable[[], torch.Tensor]
    norm: torch.Tensor | None = None

    def before_update(self) -> None:
        """Compute the norm, clip, and withhold the gradient if the update is refused."""
        dense = global_grad_norm(self.model.parameters(), self.expert_group)
        # Gradients still carry the loss scale, the tables' norm does not.
        self.norm = torch.hypot(
            dense / self.loss_scale.value(), self.tables_norm().to(dense.device)
        )
        if self.max_norm > 0:
            clip_gradients(self.model.parameters(), self.norm, self.max_norm)
        self.veto.before_stage_0_step(
            list(self.model.parameters()), float(self.norm), self.precision
        )
