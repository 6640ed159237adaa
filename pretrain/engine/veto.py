"""Refusing an update after its gradient is known and before anything has moved, in every ZeRO stage and precision.

DeepSpeed's optimizers leave weights, moments and step counts as they are where a gradient is not finite. A refused gradient is told to them as
such a one, at the place where they compute its global norm. Only stage 0 in fp32 has no such way: torch's own optimizers pass over a parameter
without gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import nn

# Is asked with the global gradient norm of a step, a finite one, without loss scale; the same answer on every rank.
Question = Callable[[float], bool]


class UpdateVeto:
    """Stands between the gradient norm of a step and its update.

    Args:
        optimizer: the one that ``deepspeed.initialize`` returned.

    Attributes:
        refused: whether the question was answered with True in this step.
        withheld: whether the gradient was taken away from torch's optimizer, because it was refused or is not finite.
        norm: of this step before clipping, where it was asked about.
        scale_stays: True while fp16's loss scale must not move.
    """

    def __init__(self, optimizer: Any, zero_stage: int) -> None:
        self.optimizer = optimizer
        self.refused = self.withheld = self.scale_stays = False
        self.norm = math.nan
        self._question: Question | None = None
        if zero_stage in (1, 2):
            norm_of = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda norm_type=2: self._judged([norm_of(norm_type)])[0]
        elif zero_stage == 3:
            groups_of = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: self._judged(groups_of())
        if hasattr(optimizer, "_update_scale"):
            self._update_scale = optimizer._update_scale
            optimizer._update_scale = self._scale_after
        scaler: Any = getattr(optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = (
                False  # steps that are skipped in a row end a run elsewhere, in a sentence
            )

    def begin(self, question: Question | None) -> None:
        """Starts a step whose update ``question`` may refuse by answering True."""
        self.refused = self.withheld = False
        self._question = question

    def before_stage_0_step(
        self, parameters: list[nn.Parameter], norm: float, precision: str
    ) -> None:
        """Asks at stage 0, where the engine knows the norm itself. In fp32 a gradient that is not finite is withheld in any case."""
        self._ask(norm)
        if precision == "fp32":
            self.withheld = self.refused or not math.isfinite(norm)
            for parameter in parameters if self.withheld else ():
                parameter.grad = None
        elif self.refused:
            next(parameter.grad for parameter in parameters if parameter.grad is not None).fill_(
                math.inf
            )

    def _judged(self, scaled_norms: list[Any]) -> list[Any]:
        """The norms as they are, or in place of refused ones one that is not finite."""
        if self._question is None:
            return scaled_norms
        self._ask(float(combine_grad_norm_groups(scaled_norms)) / float(self.optimizer.loss_scale))
        return (
            [torch.full_like(torch.as_tensor(scaled_norms[0]), math.inf)]
            if self.refused
            else scaled_norms
        )

    def _ask(self, norm: float) -> None:
        """A norm that is not finite needs no question: its step is skipped."""
        if self._question is not None and math.isfinite(norm):
            self.norm, self.refused = norm, self._question(norm)

    def _scale_after(self, overflow: bool = False) -> None:
        """A gradient that was refused is no overflow: fp16's loss scale is not to blame for it."""
        if not self.scale_stays:
            self._update_scale(overflow and not self.refused)
