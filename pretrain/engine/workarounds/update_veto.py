"""Refusing an update after its gradient is known and before anything has moved.

Fact: DeepSpeed has no way to refuse an update. Its optimizers leave weights, moments and step
    counts as they are only if a gradient is not finite; stage 0 in fp32 has not even that, but
    torch's own optimizers pass over a parameter without gradient. In fp16 an optimizer raises an
    error once the loss scale is at its minimum.
Versions: 0.19.8
Upstream: none known
Effect: guards could not skip a step whose loss or gradient norm spikes. So a refused gradient is
    shown to DeepSpeed as one that is not finite, at the place where it computes the global norm.
Test: tests/integration/guards/test_skipped_steps.py fails without it; none shows that DeepSpeed has
    changed
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import nn

# A step's global gradient norm, finite and without loss scale -> True to refuse the update. Must
# return the same on every rank.
Question = Callable[[float], bool]


class UpdateVeto:
    """Intervenes between the gradient norm of a step and its update.

    Args:
        optimizer: the one that ``deepspeed.initialize`` returned.

    Attributes:
        refused: whether the update of this step was refused.
        withheld: whether the gradient was removed from torch's optimizer, because the update was
            refused or the gradient is not finite.
        norm: of this step before clipping, if the question was asked.
        keeps_loss_scale: True while fp16's loss scale must not move.
    """

    def __init__(self, optimizer: Any, zero_stage: int) -> None:
        self.optimizer = optimizer
        self.refused = False
        self.withheld = False
        self.keeps_loss_scale = False
        self.norm = math.nan
        self._question: Question | None = None
        if zero_stage in (1, 2):
            # The place at which each stage computes the norm that clipping and the overflow check
            # read.
            norm_of = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda norm_type=2: self._asked([norm_of(norm_type)])[0]
        elif zero_stage == 3:
            groups_of = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: self._asked(groups_of())
        if hasattr(optimizer, "_update_scale"):
            self._update_scale = optimizer._update_scale
            optimizer._update_scale = self._scale_after
        scaler: Any = getattr(optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            # The guards end a run of skipped steps, with a sentence that says what to do.
            scaler.raise_error_at_min_scale = False

    def begin(self, question: Question | None) -> None:
        """Start a step whose update ``question`` may refuse."""
        self.refused = False
        self.withheld = False
        self._question = question

    def before_stage_0_step(
        self, parameters: list[nn.Parameter], norm: float, precision: str
    ) -> None:
        """Ask at stage 0, whose norm our own engine computes.

        In fp32 a gradient that is not finite is withheld in any case: torch's optimizers would
        apply it.
        """
        self._ask(norm)
        if precision == "fp32":
            self.withheld = self.refused or not math.isfinite(norm)
            if self.withheld:
                for parameter in parameters:
                    parameter.grad = None
        elif self.refused:
            gradients = (parameter.grad for parameter in parameters)
            # One infinite element is enough: DeepSpeed's low-precision optimizer skips the whole
            # step.
            next(gradient for gradient in gradients if gradient is not None).fill_(math.inf)

    def _asked(self, scaled_norms: list[Any]) -> list[Any]:
        """The norms unchanged, or one that is not finite if the update is refused."""
        if self._question is None:
            return scaled_norms
        self._ask(float(combine_grad_norm_groups(scaled_norms)) / float(self.optimizer.loss_scale))
        if not self.refused:
            return scaled_norms
        return [torch.full_like(torch.as_tensor(scaled_norms[0]), math.inf)]

    def _ask(self, norm: float) -> None:
        """Ask about a finite norm; without one, the step is skipped anyway."""
        if self._question is not None and math.isfinite(norm):
            self.norm = norm
            self.refused = self._question(norm)

    def _scale_after(self, overflow: bool = False) -> None:
        """Replaces ``_update_scale``: a refused gradient is no overflow, so fp16's scale stays."""
        if not self.keeps_loss_scale:
            self._update_scale(overflow and not self.refused)
