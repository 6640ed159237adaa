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
from deepspeed.utils import groups
from torch import distributed, nn

from pretrain.engine.loss_scale import LossScale
from pretrain.engine.step_hooks import StepHook
from pretrain.engine.workarounds.update_veto import UpdateVeto


def global_grad_norm(
    parameters: Iterable[nn.Parameter], group_of: Callable[[str], distributed.ProcessGroup | None]
) -> torch.Tensor:
    """L2 norm over all parameters of the whole model, each expert and each shard counted once.

    [] fp32, the same on every rank.

    Args:
        parameters: with reduced gradients. DeepSpeed marks experts by ``allreduce = False`` and the
            name of their expert-parallel group.
        group_of: the ranks of a group that share a set of experts; None if each rank has all.
    """
    dense: list[torch.Tensor] = []
    shared: dict[str, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            # Summed in fp32: squares of fp16 gradients overflow, and those of small ones vanish.
            squared = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
            if getattr(parameter, "allreduce", True):
                dense.append(squared)
            else:
                name: str = getattr(parameter, "group_name")  # noqa: B009
                shared.setdefault(name, []).append(squared)
    total = torch.stack(dense).sum()
    for name, squares in shared.items():
        squared = torch.stack(squares).sum()
        if (group := group_of(name)) is not None:
            # Squares add up over ranks, norms do not.
            distributed.all_reduce(squared, group=group)
        total = total + squared
    return total.sqrt()


def ranks_of_experts(name: str) -> distributed.ProcessGroup | None:
    """The ranks of DeepSpeed's expert-parallel group ``ep_size_N``; None for one rank."""
    return None if name == "ep_size_1" else groups._get_expert_parallel_group(name)


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
        group_of: as :func:`global_grad_norm` takes it.
    """

    model: nn.Module
    max_norm: float
    precision: str
    loss_scale: LossScale
    veto: UpdateVeto
    tables_norm: Callable[[], torch.Tensor]
    norm: torch.Tensor | None = None
    group_of: Callable[[str], distributed.ProcessGroup | None] = ranks_of_experts

    def before_update(self) -> None:
        """Compute the norm, clip, and withhold the gradient if the update is refused."""
        dense = global_grad_norm(self.model.parameters(), self.group_of)
        # Gradients still carry the loss scale, the tables' norm does not.
        self.norm = torch.hypot(
            dense / self.loss_scale.value(), self.tables_norm().to(dense.device)
        )
        if self.max_norm > 0:
            clip_gradients(self.model.parameters(), self.norm, self.max_norm)
        self.veto.before_stage_0_step(
            list(self.model.parameters()), float(self.norm), self.precision
        )
