"""Steps that are in no metrics record yet, on other ranks than those that took them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pretrain.engine.pending import from_state, regroup, to_state
from pretrain.engine.step import StepLosses, StepResult, reduce_steps
from pretrain.model.decoder import RouterTotals


def reduced(ranks: list[list[StepResult]]) -> tuple[list[float], RouterTotals]:
    """What :func:`reduce_steps` makes of the steps of all ranks."""
    world_size = len(ranks)

    class Everyone:
        def __init__(self) -> None:
            self.world_size = world_size

        def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    # The sum over the ranks is made before: losses and totals are linear.
    summed = []
    for steps in zip(*ranks, strict=True):
        losses = torch.stack([step.losses.packed() for step in steps]).sum(0)
        totals = [step.router for step in steps if step.router is not None]
        router = RouterTotals(
            *(sum(tensors[1:], tensors[0]) for tensors in zip(*totals, strict=True))
        )
        summed.append(replace(steps[0], losses=StepLosses.unpacked(losses), router=router))
    everyone: Any = Everyone()
    losses, router = reduce_steps(summed, everyone)
    assert router is not None
    return [loss.cross_entropy for loss in losses], router


def result(generator: torch.Generator, micro_batches: int) -> StepResult:
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    return StepResult(
        losses=StepLosses.unpacked(draw(2)),
        router=RouterTotals(draw(3, 2), draw(3, 4) * 10, draw(3), draw(3)),
        micro_batches=micro_batches,
        grad_norm=1.5,
        applied=True,
        refused=False,
        micro_losses=tuple(draw(micro_batches)),
    )


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (2, 4), (4, 2), (1, 4), (2, 2)])
def test_the_records_means_and_counts_stay_the_same(before: int, now: int) -> None:
    generator = torch.Generator().manual_seed(before * 10 + now)
    ranks = [[result(generator, 8 // before) for _ in range(3)] for _ in range(before)]
    states = [to_state(steps) for steps in ranks]
    shared = from_state(regroup(states, now), torch.device("cpu"))
    losses, router = reduced(ranks)
    new_losses, new_router = reduced([shared] * now)
    assert new_losses == pytest.approx(losses, rel=1e-6)
    for found, expected in zip(new_router, router, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
