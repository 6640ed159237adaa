"""The initialization section: how random weights and learning rates depend on the width."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.core.section import Section, Width


class Initialization(Section):
    """How weights start and learn; a finished model never reads it."""

    @property
    def base_widths(self) -> BaseWidths | None:
        """The widths that learning rates were chosen at, if they depend on the width (muP)."""
        return None


class StandardInitialization(Initialization):
    """``initializer_range`` and the optimizer's learning rates, independent of the width."""

    kind: Literal["standard"] = "standard"


class BaseWidths(Section):
    """Widths of the model that learning rates were chosen for.

    A width that is left out is the same there as here, and so does not grow.
    """

    hidden_size: Width
    intermediate_size: Width | None = Field(
        None, description="of dense feed-forwards; needed where there are any"
    )
    moe_intermediate_size: Width | None = Field(
        None, description="of one expert; needed where there are any"
    )
    shared_intermediate_size: Width | None = Field(
        None, description="of one shared expert; needed where the model gives it"
    )
    num_attention_heads: Width
    num_key_value_heads: Width | None = Field(None, description="needed by attention of kind gqa")
    head_dim: Width | None = None
    q_lora_rank: Width | None = None
    kv_lora_rank: Width | None = None


class MaximalUpdate(Initialization):
    """Maximal update parametrization: learning rates transfer from the base widths to larger ones.

    muP: Yang et al. 2022, "Tensor Programs V", table 3 in the form for Adam; for mixtures of
    experts Małaśnicki et al. 2025. ``initializer_range`` and the optimizer's learning rates are
    those at the base widths; :mod:`pretrain.model.mup` has the factors at other widths.
    """

    kind: Literal["mup"]
    base: BaseWidths

    @property
    def base_widths(self) -> BaseWidths | None:
        return self.base
