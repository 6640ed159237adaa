"""Steps that are in no metrics record yet, as a checkpoint carries them, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pretrain.engine.step import StepLosses, StepResult
from pretrain.model.decoder import RouterTotals


def to_state(results: Sequence[StepResult]) -> list[dict[str, Any]]:
    """In types that a restricted loader accepts, on the host."""
    return [
        vars(result)
        | {
            "losses": result.losses.packed().cpu(),
            "router": None if result.router is None else [tensor.cpu() for tensor in result.router],
            "micro_losses": [loss.cpu() for loss in result.micro_losses],
        }
        for result in results
    ]


def from_state(states: Sequence[dict[str, Any]], device: torch.device) -> list[StepResult]:
    """The inverse of :func:`to_state`, on a device."""
    return [_step_of(state, device) for state in states]


def _step_of(state: dict[str, Any], device: torch.device) -> StepResult:
    router: RouterTotals | None = None
    if state["router"] is not None:
        router = RouterTotals(*(tensor.to(device) for tensor in state["router"]))
    on_device = {
        "losses": StepLosses.unpacked(state["losses"].to(device)),
        "router": router,
        "micro_losses": tuple(loss.to(device) for loss in state["micro_losses"]),
    }
    return StepResult(**state | on_device)
