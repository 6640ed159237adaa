"""Families of components that a recipe chooses from by ``kind``.

A family is a class; its kinds are the classes below it that give ``kind`` a value. Nothing lists the kinds: defining a
class registers it, in the tree or in a plugin (:mod:`pretrain.core.plugins`). A component's section names its
implementation by its dotted path, so that reading a recipe imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import typing
from functools import lru_cache, reduce
from operator import or_
from pkgutil import resolve_name
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import PydanticKnownError, core_schema

from pretrain.core.errors import ConfigError
from pretrain.core.section import Section

Family = TypeVar("Family", bound=Section)


class Component(Section):
    """A section that stands for a class: ``implementation`` is its ``module:name``."""

    implementation: ClassVar[str]

    @classmethod
    def implementing_class(cls) -> Any:
        """Import what this kind stands for; a file that needs DeepSpeed is imported here and nowhere else."""
        return resolve_name(cls.implementation)


def kinds_of(family: type[Family]) -> tuple[type[Family], ...]:
    """Return the kinds of a family: every class below it that has a ``kind`` of its own, in order of definition.

    Raises:
        ConfigError: if two of them have one name.
    """
    found = tuple(_below(family))
    owners: dict[str, type[Section]] = {}
    for kind in found:
        for name in names_of(kind):
            if owners.setdefault(name, kind) is not kind:
                raise ConfigError(
                    f"two kinds of {family.__name__} are named '{name}': {_where(owners[name])} "
                    f"and {_where(kind)}; rename one of them"
                )
    return found


def names_of(kind: type[Section]) -> tuple[str, ...]:
    """Return what a recipe may write as ``kind`` to get this class."""
    return typing.get_args(kind.model_fields["kind"].annotation)


def kinds_by_name(family: type[Family]) -> dict[str, type[Family]]:
    """Return the kinds of a family by what a recipe calls them, in order of definition."""
    return {name: kind for kind in kinds_of(family) for name in names_of(kind)}


def _below(family: type[Family]) -> typing.Iterator[type[Family]]:
    for child in family.__subclasses__():
        if "kind" in child.__annotations__:
            yield child
        yield from _below(child)


def _where(kind: type[Section]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@lru_cache(maxsize=128)
def _union(kinds: tuple[type[Section], ...]) -> TypeAdapter[Any]:
    union: Any = reduce(or_, kinds)
    return TypeAdapter(Annotated[union, Field(discriminator="kind")])


class OneOf:
    """Marks a field that takes any kind of a family, as in ``Annotated[Router, OneOf()]``.

    The kinds are looked up whenever a value is validated, not when the field's class is defined: what a plugin defines
    later counts as well. If ``kind`` is left out, it is the one that its class gives as a default.
    """

    def __get_pydantic_core_schema__(self, family: Any, handler: GetCoreSchemaHandler) -> Any:
        def validate(value: Any) -> Any:
            kinds = kinds_of(family)
            if not kinds:
                raise PydanticKnownError("model_type", {"class_name": family.__name__})
            default = _default(kinds)
            if isinstance(value, dict) and default is not None:
                value = {"kind": default} | value
            # A validation error in here keeps its details; pydantic puts this field's place before theirs.
            return _union(kinds).validate_python(value)

        # "any" serialises by the value's own class, so that a kind's own fields are not lost.
        return core_schema.no_info_plain_validator_function(validate, metadata={"one_of": family})

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> Any:
        """The union of the kinds that are known when the JSON schema is asked for."""
        return handler(_union(kinds_of(schema["metadata"]["one_of"])).core_schema)


def _default(kinds: tuple[type[Section], ...]) -> Any:
    """The name of the kind that holds if a recipe leaves ``kind`` out; None if it may not."""
    fields = (kind.model_fields["kind"] for kind in kinds)
    return next((field.default for field in fields if not field.is_required()), None)
