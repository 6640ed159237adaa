"""Sinks for kernels that have no argument for them: one more key, whose products are the sinks."""

from __future__ import annotations

import torch
from torch.nn import functional

from pretrain.model.attention.kernels.config import SINK_WIDTH


def with_sinks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sinks_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One more key before the others, whose product with each query is the sink, and a zero value.

    So sinks need no mask. Every head grows by SINK_WIDTH elements, of which only the first is used:
    queries have their head's sink there, the new key has 1, and all other keys have 0.
    """
    sinks = sinks_N.to(q.dtype)[None, :, None, None].expand(*q.shape[:3], 1)
    q = functional.pad(torch.cat((q, sinks), dim=3), (0, SINK_WIDTH - 1))
    sink_key = torch.zeros(SINK_WIDTH + k.shape[3], dtype=k.dtype, device=k.device)
    sink_key[k.shape[3]] = 1
    k = functional.pad(k, (0, SINK_WIDTH))
    k = torch.cat((sink_key.expand(*k.shape[:2], 1, -1), k), dim=2)
    return q, k, functional.pad(v, (0, 0, 1, 0))


def widened(x: torch.Tensor, width: int) -> torch.Tensor:
    """Each head padded with zeros to ``width`` elements; not copied if it is wide enough."""
    return x if x.shape[3] == width else functional.pad(x, (0, width - x.shape[3]))
