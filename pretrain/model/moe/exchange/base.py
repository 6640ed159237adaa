"""The interface of every exchange of tokens between the ranks that share experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from pretrain.core.errors import ConfigError
from pretrain.core.registry import kind_name
from pretrain.model.attention.kernels.base import gpu_capability
from pretrain.model.moe.base import RoutingRecord
from pretrain.model.moe.config import MoE
from pretrain.model.moe.dispatch import Grouping
from pretrain.model.moe.router import Routing


class Routed(NamedTuple):
    """The tokens of one call and where they go.

    Attributes:
        x_TD: the tokens.
        routing: their experts and the weights of these.
        grouping: their T * K choices grouped by global expert.
        dropout: share of the elements of an expert's output that are dropped in this call.
        record: keeps what a recomputation needs not find out again; None without recomputation.
    """

    x_TD: torch.Tensor
    routing: Routing
    grouping: Grouping
    dropout: float
    record: RoutingRecord | None


class Journey(ABC):
    """One call's tokens on their way to their experts and back; to be made on all ranks at once.

    Making one sends the tokens. What its caller computes before :meth:`arrive` overlaps with that,
    and so does its backward pass with the way back of the gradients.

    Args:
        layer: a ``DroplessMoE``, for its sizes and its ``ep_group``.
    """

    @abstractmethod
    def __init__(self, layer: Any, routed: Routed) -> None: ...

    @abstractmethod
    def arrive(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait for the rows that came here, [R, D] grouped by local expert, and their counts [e].

        The counts stay on the device.
        """

    @abstractmethod
    def back(self, rows_RD: torch.Tensor) -> torch.Tensor:
        """The weighted sums [T, D] of the experts' outputs, from those computed here.

        Accumulated in fp32, in the rows' dtype.
        """


def check_parts(
    moe: MoE | None,
    ep_size: int,
    precision: str | None,
    capability: tuple[int, int] | None,
    *,
    may_lack_packages: bool = False,
) -> None:
    """Check that parts that need a package, a GPU or a number format find them.

    Args:
        precision: a resolved ``train.precision``; None if it is not known.
        capability: of the GPU; None without one.
        may_lack_packages: whether the run is planned for another machine.

    Raises:
        ConfigError: if one of them cannot run.
    """
    for part in [] if moe is None else moe.device_parts(ep_size):
        reason = None
        if part.package and not may_lack_packages and find_spec(part.package) is None:
            reason = f"the package {part.package}, which is not installed"
        if part.capability is not None and (capability is None or capability < part.capability):
            found = "there is no GPU" if capability is None else f"this one has {_text(capability)}"
            reason = f"a GPU of compute capability {_text(part.capability)} or more, but {found}"
        if part.precisions and precision is not None and precision not in part.precisions:
            reason = f"train.precision={' or '.join(part.precisions)}, not {precision}"
        if reason is not None:
            raise ConfigError(
                f"{part.field}={kind_name(part)} needs {reason}: use --set "
                f"{part.field}={part.default}"
            )


def _text(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def check_parts_here(moe: MoE | None, ep_size: int, precision: str | None = None) -> None:
    """:func:`check_parts` for the GPU and the packages of this machine."""
    check_parts(moe, ep_size, precision, gpu_capability())
