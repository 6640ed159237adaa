"""The base class of every section of a recipe."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Effect(Enum):
    """The effect of changing a field of the model on a finished model; a mark in the field's type.

    A field without a mark has that of its section, and at the top ``MEANING``: a new field is
    compared until it is declared an exception.
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
        # Fields may be named model_...: pydantic reserves that prefix for its own methods.
        protected_namespaces=(),
        # pydantic does not check defaults by default.
        validate_default=True,
        # YAML reads .inf and .nan as floats; a learning rate of NaN would only show in training.
        allow_inf_nan=False,
    )

    def keeps_the_meaning_of(self, other: Section) -> bool:
        """Whether weights that were trained with ``other`` keep their meaning under this kind."""
        return False
