"""No position encoding (NoPE, Kazemnejad et al. 2023)."""

from __future__ import annotations

from pretrain.model.positions.interface import PositionEncoding


class NoPosition(PositionEncoding):
    """Adds nothing and rotates nothing: the order shows in the causal mask alone."""
