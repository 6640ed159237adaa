"""The base class of every section of a recipe."""

from __future__ import annotations

import types
import typing
from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# Every whole number of a recipe ends up in 64 bits: in a tensor, a file or a random generator.
LARGEST = 2**63 - 1
WRONG_NUMBER = "wrong_number"
# Sizes far above any model that was trained, and low enough that counting its parameters takes
# seconds: whether a machine holds one is a question of its memory.
Width = Annotated[int, Field(ge=1, le=2**20)]
Layers = Annotated[int, Field(ge=1, le=2048)]
Experts = Annotated[int, Field(ge=1, le=2**20)]
Vocabulary = Annotated[int, Field(ge=1, le=2**28)]
SequenceTokens = Annotated[int, Field(ge=1, le=2**27)]
Sequences = Annotated[int, Field(ge=1, le=2**24)]
Tokens = Annotated[int, Field(ge=1, le=10**18)]
Ranks = Annotated[int, Field(ge=1, le=2**20)]
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

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, content: Any) -> Any:
        """Refuse true and false for numbers, which pydantic takes for 1 and 0, and over 64 bits.

        Not by a validator of fields: the one that chooses a kind must not have any.
        """
        for name, value in content.items() if isinstance(content, dict) else ():
            field = cls.model_fields.get(name)
            scalars = frozenset() if field is None else frozenset(_scalars(field.annotation))
            if wrong := _wrong_number(value, scalars):
                # error_sentences.py adds the field to the path of the section.
                raise PydanticCustomError(WRONG_NUMBER, "{wrong}", {"field": name, "wrong": wrong})
        return content

    def keeps_the_meaning_of(self, other: Section) -> bool:
        """Whether weights that were trained with ``other`` keep their meaning under this kind."""
        return False


def _scalars(annotation: Any) -> typing.Iterator[Any]:
    """Yield the types of the single values in a field's type; sections check their own."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, Annotated, list, tuple, dict):
        for part in typing.get_args(annotation):
            yield from _scalars(part)
    elif isinstance(annotation, type):
        yield annotation


def _wrong_number(value: Any, scalars: frozenset[Any]) -> str | None:
    """Return why a value is no number, if its field takes numbers only; None if it may be one."""
    is_number = bool(scalars & {int, float}) and bool not in scalars
    for number in _leaves(value) if is_number else ():
        if isinstance(number, bool):
            return f"must be a number, not {str(number).lower()}"
        if int in scalars and isinstance(number, int | float) and abs(number) > LARGEST:
            return "must fit into 64 bits, so it is at most 9.2e18"
    return None


def _leaves(value: Any) -> typing.Iterator[Any]:
    """Yield a value, or those in a list or mapping, keys included."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    yield from value if isinstance(value, list | tuple) else [value]
