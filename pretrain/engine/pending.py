"""Steps that are in no metrics record yet, saved in checkpoints bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch

from pretrain.engine.step import StepLosses, StepResult
from pretrain.model.decoder import RouterTotals


class SavedStep(TypedDict):
    """A :class:`StepResult` in types that a restricted loader accepts, on the host."""

    losses: torch.Tensor
    router: list[torch.Tensor] | None
    micro_batches: int
    grad_norm: float
    applied: bool
    refused: bool
    micro_losses: list[torch.Tensor]


def to_state(results: Sequence[StepResult]) -> list[SavedStep]:
    """What a checkpoint holds of these steps."""
    return [_saved(result) for result in results]


def from_state(states: Sequence[SavedStep], device: torch.device) -> list[StepResult]:
    """The inverse of :func:`to_state`, on a device."""
    return [_step_of(state, device) for state in states]


def _saved(result: StepResult) -> SavedStep:
    return SavedStep(
        losses=result.losses.packed().cpu(),
        router=None if result.router is None else [tensor.cpu() for tensor in result.router],
        micro_batches=result.micro_batches,
        grad_norm=result.grad_norm,
        applied=result.applied,
        refused=result.refused,
        micro_losses=[loss.cpu() for loss in result.micro_losses],
    )


def _step_of(state: SavedStep, device: torch.device) -> StepResult:
    router: RouterTotals | None = None
    if state["router"] is not None:
        router = RouterTotals(*(tensor.to(device) for tensor in state["router"]))
    return StepResult(
        losses=StepLosses.unpacked(state["losses"].to(device)),
        router=router,
        micro_batches=state["micro_batches"],
        grad_norm=state["grad_norm"],
        applied=state["applied"],
        refused=state["refused"],
        micro_losses=tuple(loss.to(device) for loss in state["micro_losses"]),
    )
