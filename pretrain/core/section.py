"""What every section of a recipe is made of."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Effect(Enum):
    """What changing a field of the model does to a finished model; a mark in the field's type.

    A field without a mark has that of the section it belongs to, and at the top ``MEANING``: a new
    field is compared until it is named as an exception.
    """

    NONE = (
        "it computes the same: the field is read in training only, or chooses how the same is "
        "computed"
    )
    FUNCTION = (
        "it computes something else, with weights that keep their meaning: training on adapts them"
    )
    MEANING = "its weights mean something else"


class Section(BaseModel):
    """A part of a recipe: frozen, strict about unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        validate_default=True,
        allow_inf_nan=False,
    )

    def keeps_the_meaning_of(self, other: Section) -> bool:
        """Whether weights trained with ``other`` in this kind's place keep their meaning."""
        return False
