"""The result of one optimizer step, and how those of several steps are reduced over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pretrain.engine.topology import Topology
from pretrain.model.decoder import RouterTotals, TrainOutput

# (cross-entropy per token in nats, gradient norm), both over all ranks -> True to skip the update.
ShouldSkip = Callable[[float, float], bool]


@dataclass(frozen=True)
class StepLosses:
    """Losses of a step on this rank, averaged over its micro batches: [] fp32 on the device.

    Attributes:
        cross_entropy: of the next token, nats per counted token.
        total: the whole loss that was minimised, router losses included.
        multi_token: cross-entropy of the further tokens, by the same normalizer; None without
            multi-token prediction.
    """

    cross_entropy: torch.Tensor
    total: torch.Tensor
    multi_token: torch.Tensor | None = None

    def packed(self) -> torch.Tensor:
        """All of them in one tensor, [2] or [3], for one collective or one transfer."""
        further = [] if self.multi_token is None else [self.multi_token]
        return torch.stack([self.cross_entropy, self.total, *further])

    @classmethod
    def unpacked(cls, packed: torch.Tensor) -> StepLosses:
        """The inverse of :meth:`packed`."""
        return cls(*packed.unbind())


@dataclass(frozen=True)
class MeanLosses:
    """:class:`StepLosses` averaged over all ranks, on the host."""

    cross_entropy: float
    total: float
    multi_token: float | None = None


@dataclass(frozen=True)
class StepResult:
    """One optimizer step as this rank saw it; on the device until :func:`reduce_steps`.

    Attributes:
        losses: means over this rank's micro batches.
        router: sums over this rank's micro batches (None for a dense model).
        micro_batches: number of them.
        grad_norm: L2 norm over the whole model before clipping, the same on every rank.
        applied: False if the update was skipped, because a gradient was not finite or the update
            was refused.
        refused: True if ``should_skip`` refused it.
        micro_losses: [] fp32 each, the minimised loss of every micro batch.
    """

    losses: StepLosses
    router: RouterTotals | None
    micro_batches: int
    grad_norm: float
    applied: bool
    refused: bool
    micro_losses: tuple[torch.Tensor, ...]


class StepTotals:
    """Sums over the micro batches of a step, while it runs.

    Args:
        num_losses: 2, or 3 with multi-token prediction.
    """

    def __init__(self, num_losses: int, micro_batches: int, device: torch.device) -> None:
        self.router: RouterTotals | None = None
        self.micro_losses: list[torch.Tensor] = []
        self._packed = torch.zeros(num_losses, device=device)
        self._micro_batches = micro_batches

    @property
    def losses(self) -> StepLosses:
        """Means over the step's micro batches; too small until the last one is added."""
        return StepLosses.unpacked(self._packed)

    def add_losses(self, output: TrainOutput, normalizer: torch.Tensor | float) -> None:
        """Add the losses of one micro batch.

        Args:
            normalizer: counted tokens of a micro batch, see ``Engine.train_step``.
        """
        # Everything stays on the device: reading a loss here would synchronise in every micro
        # batch.
        loss = output.loss.detach()
        further = output.multi_token_nll
        losses = [output.nll / normalizer, loss]
        losses += [] if further is None else [further / normalizer]
        self.micro_losses.append(loss)
        self._packed += torch.stack(losses) / self._micro_batches

    def add_router(self, output: TrainOutput) -> None:
        """Add the router statistics of one micro batch."""
        self.router = add_totals(self.router, output.router)


def add_totals(total: RouterTotals | None, more: RouterTotals | None) -> RouterTotals | None:
    """The sum of two router statistics; ``total`` is None before the first one."""
    if total is None or more is None:
        return more
    return RouterTotals(*(a + b for a, b in zip(total, more, strict=True)))


def reduce_steps(
    results: Sequence[StepResult], topology: Topology
) -> tuple[list[MeanLosses], RouterTotals | None]:
    """Reduce several steps over all ranks, with two collectives and one transfer to the host.

    Every rank must call it.

    Returns:
        The losses of each step, averaged over the ranks; and the router's statistics over all steps
            and ranks: counts summed, everything else averaged over micro batches.
    """
    # [steps, losses]: one collective for all steps.
    stacked = torch.stack([result.losses.packed() for result in results])
    means = (topology.all_reduce_sum(stacked) / topology.world_size).tolist()
    losses = [MeanLosses(*step) for step in means]
    router: RouterTotals | None = None
    for result in results:
        router = add_totals(router, result.router)
    if router is None:
        return losses, None
    micro_batches = sum(result.micro_batches for result in results) * topology.world_size
    averaged = torch.cat(
        [router.losses_LJ, router.entropy_L[:, None], router.dropped_L[:, None]], dim=1
    )
    # [L, E + J + 1 + 1]: one collective for all statistics.
    packed = torch.cat([router.counts_LE, averaged / micro_batches], dim=1)
    num_experts = router.counts_LE.shape[1]
    num_losses = router.losses_LJ.shape[1]
    counts_LE, losses_LJ, entropy_L1, dropped_L1 = (
        topology.all_reduce_sum(packed).cpu().split((num_experts, num_losses, 1, 1), dim=1)
    )
    return losses, RouterTotals(losses_LJ, counts_LE, entropy_L1[:, 0], dropped_L1[:, 0])
