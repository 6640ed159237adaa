"""What every section of a recipe is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of a recipe: frozen, strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True, allow_inf_nan=False)
