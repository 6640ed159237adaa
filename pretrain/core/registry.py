"""Families of components that a recipe chooses from by ``kind``.

A component's section names its implementation by its dotted path, so that reading a recipe imports neither torch nor DeepSpeed, and so that
nothing lists the kinds a second time.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import core_schema

from pretrain.core.section import Section

Family = TypeVar("Family", bound=Section)


class Component(Section):
    """A section that stands for a class: ``implementation`` is its ``module:name``."""

    implementation: ClassVar[str]
    if TYPE_CHECKING:
        # Each kind declares it as a Literal. A field here would come first in every saved recipe.
        kind: str

    @classmethod
    def implementing_class(cls) -> Any:
        """Imports what this kind stands for; a file that needs DeepSpeed is imported here and nowhere else."""
        return resolve_name(cls.implementation)


def kinds_of(family: type[Family]) -> tuple[type[Family], ...]:
    """Every class below ``family`` that has a ``kind`` of its own, in order of definition."""
    found: list[type[Family]] = []
    for child in family.__subclasses__():
        if "kind" in child.__annotations__:
            found.append(child)
        found.extend(kinds_of(child))
    return tuple(found)


def kind_name(kind: type[Section]) -> str:
    """What a recipe writes for a kind."""
    name: str = get_args(kind.model_fields["kind"].annotation)[0]
    return name


class NameOf:
    """Marks a field that takes the name of a kind without fields: ``Annotated[str, NameOf(Kernel)]``.

    As with :class:`OneOf`, a new kind needs to be imported, and no list edited.
    """

    def __init__(self, family: type[Section]) -> None:
        self.family = family

    @property
    def names(self) -> list[str]:
        """What a recipe may write."""
        return [kind_name(kind) for kind in kinds_of(self.family)]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.literal_schema(self.names)


class OneOf:
    """Marks a field that takes any kind of a family, ``Annotated[Router, OneOf()]``: a new kind needs to be imported, and no list edited.

    Where ``kind`` is left out, it is the one that its class gives as a default.
    """

    def __get_pydantic_core_schema__(self, family: Any, handler: GetCoreSchemaHandler) -> Any:
        kinds = kinds_of(family)
        default = next(
            (
                kind.model_fields["kind"].default
                for kind in kinds
                if not kind.model_fields["kind"].is_required()
            ),
            None,
        )

        def with_kind(value: Any) -> Any:
            return (
                {"kind": default} | value
                if isinstance(value, dict) and default is not None
                else value
            )

        union = handler.generate_schema(Annotated[reduce(or_, kinds), Field(discriminator="kind")])
        return core_schema.no_info_before_validator_function(with_kind, union)
