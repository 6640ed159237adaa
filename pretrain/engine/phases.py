"""Parameters that a phase of a run keeps unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class FrozenParameters:
    """Keeps some parameters unchanged, at every ZeRO stage and under any optimizer.

    Their gradients are zeroed before DeepSpeed sees them, so the norm, and with it clipping, is
    that of the other parameters. An optimizer would still move them, by weight decay and by
    moments, so after each of its steps the fp32 weights, from which DeepSpeed makes its copies, are
    restored. The parameter groups do not change, and neither does the layout of checkpoints: the
    moments fade meanwhile and recover when training continues.

    Args:
        optimizer: torch's, which DeepSpeed drives.
        masters_of: this rank's fp32 weights of a parameter, as a view of what ``optimizer``
            updates; None if this rank holds none of them.

    Attributes:
        ids: of the parameters that are frozen now.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        masters_of: Callable[[nn.Parameter], torch.Tensor | None],
    ) -> None:
        self.masters_of = masters_of
        self.ids: set[int] = set()
        self._masters: list[torch.Tensor] = []
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._hooks: list[RemovableHandle] = []
        optimizer.register_step_pre_hook(self._save)
        optimizer.register_step_post_hook(self._put_back)

    def freeze(self, parameters: Sequence[nn.Parameter]) -> None:
        """Freeze these parameters, and unfreeze all others."""
        for hook in self._hooks:
            hook.remove()
        self.ids = {id(parameter) for parameter in parameters}
        # requires_grad=False would change what DeepSpeed reduces and expects; a zero gradient does
        # not.
        self._hooks = [parameter.register_hook(torch.zeros_like) for parameter in parameters]
        masters = [self.masters_of(parameter) for parameter in parameters]
        self._masters = [master for master in masters if master is not None]

    def _save(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Copy the frozen weights that this step of the optimizer is about to update."""
        # ZeRO steps through its groups one by one, and masters are views of flat partitions: a
        # shared storage says which of them this call updates.
        stepped = {
            parameter.untyped_storage().data_ptr()
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self._saved = [
            (master, master.detach().clone())
            for master in self._masters
            if master.untyped_storage().data_ptr() in stepped
        ]

    @torch.no_grad()
    def _put_back(self, *_: Any) -> None:
        """Restore the copies, after the step."""
        for master, saved in self._saved:
            master.copy_(saved)
        self._saved = []
