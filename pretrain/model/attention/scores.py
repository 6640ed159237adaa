"""The terms of the softmax besides q k^T, as data: each kernel applies them in its cheapest way."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain.model.attention.mask import AttentionMask


@dataclass(frozen=True)
class Scores:
    """The terms of softmax(scale * q k^T - slope * distance, masked; sinks) of one layer.

    Attributes:
        mask: which keys a query may see.
        scale: factor of q k^T.
        window: tokens a query sees, itself included; None for all before it.
        slopes_N: fp32 [N], ALiBi: a key d tokens back gets -slope * d. The same for all layers,
            without gradient.
        sinks_N: [N], the logit of one more choice of each head, which adds nothing to the output.
        dropout: share of attention weights that are zeroed; 0 outside training.
    """

    mask: AttentionMask
    scale: float
    window: int | None = None
    slopes_N: torch.Tensor | None = None
    sinks_N: torch.Tensor | None = None
    dropout: float = 0.0
