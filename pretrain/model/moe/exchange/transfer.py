"""All-to-alls of rows that run while something else is computed, and the splits that they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm
from torch import distributed
from torch.autograd.function import once_differentiable

from pretrain.model.moe.base import RoutingRecord


class Counts:
    """Counts of rows that each rank of a group sends to each other one, as numbers on the host.

    One all-to-all, and one copy to the host that is under way until :meth:`numbers` waits for it:
    the only host synchronisation of an exchange.

    Attributes:
        received_PN: what each rank sends here, on the device.
    """

    def __init__(self, sent_PN: torch.Tensor, group: distributed.ProcessGroup) -> None:
        self.received_PN = torch.empty_like(sent_PN)
        comm.all_to_all_single(self.received_PN, sent_PN.contiguous(), group=group)
        # Pinned if it comes from a GPU: the copy is queued before all that follows, and waited for
        # alone.
        both_2PN = torch.stack((sent_PN, self.received_PN))
        self._host_2PN = both_2PN.to("cpu", non_blocking=True)
        self._copied = None
        if sent_PN.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._numbers: list[list[list[int]]] | None = None

    def numbers(self) -> list[list[list[int]]]:
        """Sent and received counts, [2, P, N]; the first call waits for the device."""
        if self._numbers is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._numbers = self._host_2PN.tolist()
        return self._numbers


class Transfer:
    """One all-to-all of rows, and in the backward pass that of their gradients.

    :meth:`start` returns at once and :meth:`finish` waits. The backward pass does the same in the
    mirrored order: gradients leave at the backward of ``finish`` and are waited for at that of
    ``start``, so what was computed between the two has its backward pass in between.

    Args:
        sent: rows to each rank.
        received: rows from each rank.
        record: may keep the rows for a recomputation, in which none travel then.
        name: of the transfer in the record.
    """

    def __init__(
        self,
        sent: Sequence[int],
        received: Sequence[int],
        group: distributed.ProcessGroup,
        record: RoutingRecord | None = None,
        name: str = "rows",
    ) -> None:
        self.sent = list(sent)
        self.received = list(received)
        self._group = group
        self._record = record
        self._name = name
        self._work: Any = None
        # Both ends of what is under way; the source must live as long.
        self._source: torch.Tensor | None = None
        self._target: torch.Tensor | None = None
        self.gradient: torch.Tensor | None = None

    def start(self, rows_RN: torch.Tensor) -> Transfer:
        """Send the rows [R, N], in the order of the ranks they go to."""
        self._target = _Start.apply(rows_RN, self)
        return self

    def finish(self) -> torch.Tensor:
        """The rows that came here, [R', N], in the order of the ranks they came from."""
        is_first_pass = self._work is not None
        arrived: torch.Tensor = _Finish.apply(self._target, self)
        self._target = None
        if self._record is not None and is_first_pass:
            self._record.keep(self._name, arrived)
        return arrived

    def reversed(self) -> Transfer:
        """The way back."""
        name = f"{self._name} back"
        return type(self)(self.received, self.sent, self._group, self._record, name)

    def launch(self, rows_RN: torch.Tensor, *, backward: bool) -> torch.Tensor:
        """Start the communication, and return the tensor that it fills."""
        if not backward and self._record is not None:
            kept = self._record.kept(self._name)
            if kept is not None:
                return kept.detach()
        sent, received = (self.received, self.sent) if backward else (self.sent, self.received)
        self._source = rows_RN.contiguous()
        target = rows_RN.new_empty(sum(received), rows_RN.shape[1])
        self._work = comm.all_to_all_single(
            target,
            self._source,
            output_split_sizes=received,
            input_split_sizes=sent,
            group=self._group,
            async_op=True,
        )
        return target

    def wait(self) -> None:
        """Wait for the communication: on a GPU its stream does, not the host."""
        if self._work is not None:
            self._work.wait()
        self._work = self._source = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RN, transfer):  # type: ignore[no-untyped-def]
        ctx.transfer = transfer
        return transfer.launch(rows_RN, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):  # type: ignore[no-untyped-def]
        # The gradient that autograd passes stands for the one under way, see _Finish.
        ctx.transfer.wait()
        gradient, ctx.transfer.gradient = ctx.transfer.gradient, None
        return gradient, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, target_RN, transfer):  # type: ignore[no-untyped-def]
        ctx.transfer = transfer
        transfer.wait()
        return target_RN.view_as(target_RN)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient_RN):  # type: ignore[no-untyped-def]
        ctx.transfer.gradient = ctx.transfer.launch(gradient_RN, backward=True)
        # Of the shape that autograd expects. The transfer has the gradient itself, which has as
        # many rows as were sent; only _Start reads it.
        return gradient_RN, None
