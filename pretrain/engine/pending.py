"""Steps that are in no row of metrics yet, as a checkpoint carries them: each rank's own, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pretrain.engine.engine import StepResult
from pretrain.model.decoder import RouterTotals


def to_state(results: Sequence[StepResult]) -> list[dict[str, Any]]:
    """In types that a restricted loader accepts, on the host."""
    return [
        vars(result)
        | {
            "losses": result.losses.cpu(),
            "router": None if result.router is None else [tensor.cpu() for tensor in result.router],
            "micro_losses": [loss.cpu() for loss in result.micro_losses],
        }
        for result in results
    ]


def from_state(states: Sequence[dict[str, Any]], device: torch.device) -> list[StepResult]:
    return [
        StepResult(
            **state
            | {
                "losses": state["losses"].to(device),
                "router": None
                if state["router"] is None
                else RouterTotals(*(tensor.to(device) for tensor in state["router"])),
                "micro_losses": tuple(loss.to(device) for loss in state["micro_losses"]),
            }
        )
        for state in states
    ]
