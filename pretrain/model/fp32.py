"""Tensors that stay fp32 when a model is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class KeepsFp32(nn.Module):
    """A module whose own fp32 tensors move with it but are never cast.

    They take small updates that fewer bits would lose: in bf16, 0.5 + 0.001 is 0.5.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # ``nn.Module._apply`` would cast children with this module's rule: each child applies its
        # own.
        if recurse:
            for child in self.children():
                child._apply(fn)

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return (
                tensor.to(moved.device)
                if tensor.dtype == torch.float32 and moved.dtype != torch.float32
                else moved
            )

        return super()._apply(move, recurse=False)
