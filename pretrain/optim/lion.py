"""Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2)."""

from __future__ import annotations

import torch

from pretrain.optim.config import LionConfig
from pretrain.optim.param_groups import ParamGroup


class Lion(torch.optim.Optimizer):
    """Elementwise, so it trains whole parameters and flat partitions of them alike.

    State: ``momentum``, with the parameter's shape and dtype.
    """

    def __init__(self, groups: list[ParamGroup], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                direction = torch.lerp(parameter.grad, state["momentum"], beta1).sign_()
                # Decoupled weight decay, applied before the update as in AdamW.
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(
                    direction, alpha=-group["lr"]
                )
                # After the update, with beta2: the update itself averages with beta1.
                state["momentum"].lerp_(parameter.grad, 1.0 - beta2)


def lion(groups: list[ParamGroup], config: LionConfig) -> torch.optim.Optimizer:
    """The optimizer of a recipe with ``optimizer.kind=lion``."""
    return Lion(groups, (config.beta1, config.beta2))
