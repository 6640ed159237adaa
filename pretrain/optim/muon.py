"""Muon (Jordan et al. 2024): momentum, orthogonalised by Newton-Schulz iterations.

AdamW trains all that is no hidden matrix.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch.optim.adamw import adamw

from pretrain.optim.config import MuonConfig
from pretrain.optim.matrix_shards import ELEMENTS_A_BATCH, MatrixOptimizer
from pretrain.optim.param_groups import ParamGroup

# (a, b, c) of x -> a x + b x^3 + c x^5: the steepest slope at zero whose iteration still ends
# between 0.7 and 1.2 (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Root mean square of an update, as AdamW's is in practice (Liu et al. 2025, section 2.2).
UPDATE_RMS = 0.2


def orthogonalize(x_NAB: torch.Tensor, steps: int) -> torch.Tensor:
    """Approximately U V^T of each matrix's singular value decomposition.

    Singular values end between about 0.7 and 1.2. Zeros stay zeros.

    Args:
        x_NAB: [N, A, B] in the precision of the iterations; the N matrices are independent.
    """
    a, b, c = NEWTON_SCHULZ
    # The Gram matrix is computed on the shorter side.
    tall = x_NAB.shape[-2] > x_NAB.shape[-1]
    x_NAB = x_NAB.mT if tall else x_NAB
    # The iteration converges for singular values up to 1, which the Frobenius norm bounds.
    x_NAB = x_NAB / torch.linalg.vector_norm(x_NAB, dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram_NAA = x_NAB @ x_NAB.mT
        polynomial_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        x_NAB = torch.baddbmm(x_NAB, polynomial_NAA, x_NAB, beta=a)
    return x_NAB.mT if tall else x_NAB


class Muon(MatrixOptimizer):
    """Groups whose ``rule`` is ``muon`` hold matrices [..., A, B]; those with ``adamw`` anything.

    ZeRO trains flat partitions instead: ``shards`` then gives, for each of them in a ``muon``
    group, the places of its matrices. State: ``momentum`` of the parameter's shape, or AdamW's
    ``exp_avg``, ``exp_avg_sq`` and ``step``.
    """

    matrix_rule: ClassVar[str] = "muon"

    def __init__(self, groups: list[ParamGroup], config: MuonConfig) -> None:
        self.config = config
        self.shards = {}
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        If partitions are shared, all ranks of their group must call it alike.
        """
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["rule"] == "adamw":
                self._step_adamw(parameters, group)
                continue
            for parameter in parameters:
                self._step_muon(parameter, group)

    def _step_muon(self, parameter: torch.Tensor, group: ParamGroup) -> None:
        """Update one parameter, or one flat partition of matrices."""
        gradient = parameter.grad
        state = self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        rate = group["lr"]
        shards = self.shards.get(parameter)
        momentum.lerp_(gradient, 1.0 - self.config.momentum)
        # Decoupled weight decay, before the update as in AdamW.
        parameter.mul_(1.0 - rate * group["weight_decay"])
        if shards is not None:
            shards.transform(
                take=lambda place: self._marked_update(gradient[place], momentum[place]),
                change=self._directions,
                give=lambda place, direction: parameter[place].add_(
                    direction.to(parameter), alpha=-rate
                ),
                dtype=self._dtype(shards.device),
            )
            return
        # Stacked experts are independent matrices, transformed in batches to bound the memory.
        *_, rows, columns = parameter.shape
        size = max(1, ELEMENTS_A_BATCH // (rows * columns))
        batches = [whole.reshape(-1, rows, columns).split(size) for whole in (gradient, momentum)]
        for moved, *looked_at in zip(
            parameter.view(-1, rows, columns).split(size), *batches, strict=True
        ):
            touched_N = looked_at[0].flatten(1).any(1)
            direction = self._directions(
                self._update(*looked_at).to(self._dtype(parameter.device)), touched_N
            )
            moved.add_(direction.to(moved.dtype), alpha=-rate)

    def _dtype(self, device: torch.device) -> torch.dtype:
        asked = self.config.newton_schulz_precision
        return (
            torch.bfloat16
            if asked == "bf16" or (asked == "auto" and device.type == "cuda")
            else torch.float32
        )

    def _update(self, gradient: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
        """The momentum after this step's gradient, with Nesterov's look-ahead if configured."""
        return (
            torch.lerp(gradient, momentum, self.config.momentum)
            if self.config.nesterov
            else momentum
        )

    def _marked_update(self, gradient: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
        """The update of a part of a matrix and its mark, [P] -> [P + 1].

        The mark is 0 if the part's gradient is zero; the owner sums the marks of all parts.
        """
        return torch.cat(
            (self._update(gradient, momentum), gradient.any()[None].to(gradient.dtype))
        )

    def _directions(self, matrices_NAB: torch.Tensor, touched_N: torch.Tensor) -> torch.Tensor:
        """The update of each matrix at a learning rate of 1; zero if its gradient is zero.

        An update's size does not depend on the momentum's: an expert without tokens would otherwise
        move equally far each step until its momentum underflows.
        """
        # An orthogonal [A, B] has root mean square 1 / sqrt(max(A, B)).
        scale = UPDATE_RMS * math.sqrt(max(matrices_NAB.shape[-2:]))
        return (
            orthogonalize(matrices_NAB, self.config.newton_schulz_steps)
            .mul_(scale)
            .mul_((touched_N > 0)[:, None, None])
        )

    def _step_adamw(self, parameters: list[torch.Tensor], group: ParamGroup) -> None:
        """As torch.optim.AdamW, by torch's own functional form."""
        config = self.config
        for parameter in parameters:
            if not self.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = moments | {"step": torch.zeros((), device=parameter.device)}
        states = [self.state[parameter] for parameter in parameters]
        averages, squares, steps = (
            [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            averages,
            squares,
            [],
            steps,
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
        )


def muon(groups: list[ParamGroup], config: MuonConfig) -> torch.optim.Optimizer:
    """The optimizer of a recipe with ``optimizer.kind=muon``."""
    return Muon(groups, config)
