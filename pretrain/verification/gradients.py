"""The gradients of a step that an engine is about to apply, the whole model's, by expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.checkpoint.places import place_of
from pretrain.checkpoint.weights import is_expert
from pretrain.engine.engine import Engine
from pretrain.engine.gradients import full_gradient


def expert_norms(name: str, gradient: Tensor, first_row: int) -> dict[str, float]:
    """Return the norm of each expert's gradient in one parameter.

    Args:
        gradient: of one expert, or [E, ...] of stacked ones.
        first_row: the number of the first of stacked ones.
    """
    values = gradient.detach().float()
    # Experts that have a name of their own are matrices or vectors; stacked ones have one
    # dimension more, and the number of their row is their name.
    if values.dim() < 3:
        return {name: float(values.norm())}
    norms = values.flatten(1).norm(dim=1).tolist()
    return {f"{name}[{first_row + row}]": norm for row, norm in enumerate(norms)}


def engine_expert_norms(engine: Engine) -> dict[str, float]:
    """Return the norms of all experts' gradients, which DeepSpeed has reduced.

    Every rank must call it, between the last backward pass of a step and its update. The result is
    the same on every rank.
    """
    scale = engine.loss_scale.value()
    found: dict[str, float] = {}
    for name, parameter in engine.model.named_parameters():
        if not is_expert(parameter):
            continue
        gradient = full_gradient(parameter)
        if gradient is None:
            continue
        place = place_of(name, parameter, engine)
        row = torch.Size(place.shape[1:]).numel()
        found |= expert_norms(place.name, gradient / scale, place.offset // row)
    merged: dict[str, float] = {}
    for norms in engine.topology.all_gather(found):
        merged |= norms
    return merged


def model_expert_norms(model: nn.Module) -> dict[str, float]:
    """Return the norms of all experts' gradients of a model that has them all."""
    found: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if is_expert(parameter) and parameter.grad is not None:
            found |= expert_norms(name, parameter.grad, 0)
    return found
