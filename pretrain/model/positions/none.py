"""No position encoding (NoPE, Kazemnejad et al. 2023)."""

from __future__ import annotations

from pretrain.model.positions.interface import PositionEncoding


class NoPosition(PositionEncoding):
    """Adds nothing and turns nothing: the causal mask alone tells the order."""
