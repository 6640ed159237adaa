"""What DeepSpeed's engine has to be told when a run enters another phase: its accumulation, and which parameters stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def set_batch_sizes(engine: Any, micro_batch_size: int, accumulation_steps: int) -> None:
    """Makes every following optimizer step one of ``accumulation_steps`` micro batches. To be called between two steps.

    DeepSpeed's own ``set_train_batch_size`` leaves two things behind: it finds the end of a step by the number of all micro batches so far
    modulo the new accumulation, and its ZeRO optimizers keep the old accumulation, by which stages 1 and 2 choose a buffer under offload.
    """
    engine.set_train_micro_batch_size(micro_batch_size)
    engine.set_train_batch_size(micro_batch_size * accumulation_steps * engine.dp_world_size)
    engine.micro_steps = 0
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = accumulation_steps


class FrozenParameters:
    """Keeps some parameters as they are through optimizer steps, at every ZeRO stage and under any optimizer.

    Their gradients are zero before DeepSpeed sees them, so that the norm, and with it clipping, is that of the others. An optimizer would
    still move them, by weight decay and by moments: each of its steps puts the fp32 weights back, from which DeepSpeed makes its copies. The
    parameter groups stay as they are, and with them what a checkpoint holds: the moments fade meanwhile and go on when training does.

    Args:
        optimizer: torch's, which DeepSpeed drives.
        masters_of: this rank's fp32 weights of a parameter, as a view of what ``optimizer`` updates; None where it holds none of them.
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
        """From now on these parameters, and no others, stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self.ids = {id(parameter) for parameter in parameters}
        self._hooks = [parameter.register_hook(torch.zeros_like) for parameter in parameters]
        self._masters = [
            master for parameter in parameters if (master := self.masters_of(parameter)) is not None
        ]

    def _save(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # ZeRO steps through its groups one by one.
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
        for master, saved in self._saved:
            master.copy_(saved)
        self._saved = []
