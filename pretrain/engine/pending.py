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


def regroup(ranks: Sequence[Sequence[SavedStep]], world_size: int) -> list[SavedStep]:
    """Share what some ranks saw of the same steps evenly among ``world_size`` others.

    What :func:`pretrain.engine.step.reduce_steps` makes of it stays the same. The losses of single
    micro batches are left out: no other rank takes the same ones.
    """
    return [_regrouped(steps, world_size) for steps in zip(*ranks, strict=True)]


def _regrouped(steps: Sequence[SavedStep], world_size: int) -> SavedStep:
    first = steps[0]
    before = sum(step["micro_batches"] for step in steps)
    now = max(1, before // world_size)
    router: list[torch.Tensor] | None = None
    if first["router"] is not None:
        totals = [step["router"] for step in steps if step["router"] is not None]
        sums = RouterTotals(
            *(sum(tensors[1:], tensors[0]) for tensors in zip(*totals, strict=True))
        )
        # Counts are summed over the ranks again, everything else is averaged over micro batches.
        shares = RouterTotals(*(tensor * (now / before) for tensor in sums))
        router = list(shares._replace(counts_LE=sums.counts_LE / world_size))
    losses = torch.stack([step["losses"] for step in steps]).mean(0)
    return {
        **first,
        "losses": losses,
        "router": router,
        "micro_batches": now,
        "micro_losses": [],
    }


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
