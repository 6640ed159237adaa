"""Families of components that a recipe chooses from by ``kind``.

A family is a class; its kinds are the classes below it that give ``kind`` a value. Nothing lists
the kinds: defining a class registers it, in the tree or in a plugin (:mod:`pretrain.core.plugins`).
A component's section names its implementation by its dotted path, so that reading a recipe imports
neither torch nor DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, reduce
from operator import or_
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import PydanticKnownError, core_schema

from pretrain.core.errors import ConfigError
from pretrain.core.section import Section

Family = TypeVar("Family", bound=Section)
Named = TypeVar("Named")


class Component(Section):
    """A section that configures a class: ``implementation`` is its ``module:name``."""

    implementation: ClassVar[str]
    if TYPE_CHECKING:
        # Each kind declares it as a Literal. A field here would come first in every saved recipe.
        kind: str

    @classmethod
    def implementing_class(cls) -> Any:
        """Import the class of this kind; files that need DeepSpeed are imported only here."""
        return resolve_name(cls.implementation)


def kinds_of(family: type[Family]) -> tuple[type[Family], ...]:
    """Every class below ``family`` with its own ``kind``: each before the classes below it.

    Raises:
        ConfigError: if two of them have one name.
    """
    # An inherited ``kind`` does not count: an intermediate class is no kind.
    found = tuple(kind for kind in _all_below(family) if "kind" in kind.__annotations__)
    owners: dict[str, type[Section]] = {}
    for kind in found:
        for name in _names_of(kind):
            if owners.setdefault(name, kind) is not kind:
                raise ConfigError(_same_name(family, name, owners[name], kind))
    return found


def kind_name(kind: type[Section]) -> str:
    """The ``kind`` by which a recipe chooses this class."""
    return _names_of(kind)[0]


def _names_of(kind: type[Section]) -> tuple[str, ...]:
    return get_args(kind.model_fields["kind"].annotation)


def kinds_by_name(family: type[Family]) -> dict[str, type[Family]]:
    """The kinds of a family by their name in a recipe, in the order of :func:`kinds_of`."""
    return {name: kind for kind in kinds_of(family) for name in _names_of(kind)}


def classes_by_name(family: type[Named]) -> dict[str, type[Named]]:
    """The classes below ``family`` that define a ``name``, by it.

    These are kinds without a section in a recipe, such as export targets.

    Raises:
        ConfigError: if two of them have one name.
    """
    found: dict[str, type[Named]] = {}
    for child in _all_below(family):
        if "name" in vars(child):
            name = vars(child)["name"]
            if name in found:
                raise ConfigError(_same_name(family, name, found[name], child))
            found[name] = child
    return found


def _all_below(family: type[Named]) -> Iterator[type[Named]]:
    """Every class below a family once, even if it has two parents in it."""

    def walk(parent: type[Named]) -> Iterator[type[Named]]:
        for child in parent.__subclasses__():
            yield child
            yield from walk(child)

    return iter(dict.fromkeys(walk(family)))


def _same_name(family: type, name: str, *kinds: type) -> str:
    places = " and ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    return f"two kinds of {family.__name__} are named '{name}': {places}; rename one of them"


# Building a validator takes milliseconds, and a recipe has dozens of fields.
@lru_cache(maxsize=128)
def _union(kinds: tuple[type[Section], ...]) -> TypeAdapter[Any]:
    union: Any = reduce(or_, kinds)
    return TypeAdapter(Annotated[union, Field(discriminator="kind")])


class NameOf:
    """Marks a text that names a kind of a family, as in ``Annotated[str, NameOf(TrackerKind)]``."""

    def __init__(self, family: type[Section]) -> None:
        self.family = family

    @property
    def names(self) -> list[str]:
        """The names that are known at this moment."""
        return list(kinds_by_name(self.family))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        def known(value: str) -> str:
            if value not in self.names:
                names = [repr(name) for name in self.names]
                expected = " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
                raise PydanticKnownError("literal_error", {"expected": expected})
            return value

        return core_schema.no_info_after_validator_function(known, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> Any:
        """The names that are known when the JSON schema is requested."""
        return handler(schema) | {"enum": self.names}


class OneOf:
    """Marks a field that takes any kind of a family, as in ``Annotated[Router, OneOf()]``.

    The kinds are looked up whenever a value is validated, not when the field's class is defined:
    what a plugin defines later counts as well. If ``kind`` is left out, the class with a default
    for it is chosen.

    Args:
        kind_is_required: refuse a section without ``kind``, although a class has a default for it.
    """

    def __init__(self, *, kind_is_required: bool = False) -> None:
        self.kind_is_required = kind_is_required

    def __get_pydantic_core_schema__(self, family: Any, handler: GetCoreSchemaHandler) -> Any:
        def validate(value: Any) -> Any:
            # Looked up now, not at class definition: a plugin may have added kinds since.
            kinds = kinds_of(family)
            if not kinds:
                tag = value.get("kind") if isinstance(value, dict) else value
                named = {"discriminator": "'kind'", "tag": str(tag), "expected_tags": ""}
                raise PydanticKnownError("union_tag_invalid", named)
            if self.kind_is_required and isinstance(value, dict) and "kind" not in value:
                raise PydanticKnownError("union_tag_not_found", {"discriminator": "'kind'"})
            default = _default(kinds)
            if isinstance(value, dict) and default is not None:
                value = {"kind": default} | value
            # An error in here keeps its details; pydantic puts this field's place before theirs.
            return _union(kinds).validate_python(value)

        # "any" serialises by the value's own class, so that a kind's own fields are not lost.
        return core_schema.no_info_plain_validator_function(validate, metadata={"one_of": family})

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> Any:
        """The union of the kinds that are known when the JSON schema is requested."""
        kinds = kinds_of(schema["metadata"]["one_of"])
        return handler(_union(kinds).core_schema) if kinds else {"not": {}}


def _default(kinds: tuple[type[Section], ...]) -> Any:
    """The kind to use if a recipe leaves ``kind`` out; None if it must not.

    Raises:
        ConfigError: if there are two, of which a plugin's would change what recipes mean.
    """
    found = [kind for kind in kinds if not kind.model_fields["kind"].is_required()]
    if len(found) > 1:
        places = " and ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in found)
        raise ConfigError(
            f"{places} are both what holds without a 'kind': only one of a family may give it a "
            "default"
        )
    return found[0].model_fields["kind"].default if found else None
