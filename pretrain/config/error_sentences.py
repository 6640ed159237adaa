"""Describes an error of pydantic's in a sentence that names the path and the nearest key."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Annotated, Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from pretrain.config.recipe import Recipe
from pretrain.core.plugins import trust_remedy
from pretrain.core.registry import OneOf, kinds_of
from pretrain.core.section import WRONG_NUMBER


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a value of this type may be or contain."""
    if _is_family(annotation):
        return list(kinds_of(annotation.__origin__))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (
        typing.Union,
        types.UnionType,
        typing.Annotated,
        dict,
        list,
    ):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []


def _walk(location: tuple[str | int, ...]) -> tuple[str, list[str]]:
    """Return the dotted path of an error's location, and the field names that are legal there.

    A discriminated union puts the chosen ``kind`` into the location. The user's file has no such
    level, so it is left out.
    """
    models: list[type[BaseModel]] = [Recipe]
    annotation: Any = Recipe
    dotted: list[str] = []
    legal: list[str] = []
    for part in location:
        # The part may be the chosen kind of a union, which is no level of the file.
        tagged = [
            model
            for model in models
            if "kind" in model.model_fields
            and part in typing.get_args(model.model_fields["kind"].annotation)
        ]
        if tagged and (len(models) > 1 or _is_family(annotation)) and not _is_mapping(annotation):
            annotation = None
            models = tagged
            continue
        # A level of the file: go down into the field's type.
        dotted.append(str(part))
        if isinstance(part, int):  # an entry of a list
            continue
        if _is_mapping(annotation):  # any key is legal
            annotation = None
            continue
        legal = sorted({name for model in models for name in model.model_fields})
        annotation = next(
            (_annotation(model, str(part)) for model in models if part in model.model_fields), None
        )
        models = _models_in(annotation)
    return ".".join(dotted) or "the recipe", legal


def _is_family(annotation: Any) -> bool:
    """Whether a type is one of the kinds of a family, chosen by ``kind``."""
    return typing.get_origin(annotation) is typing.Annotated and any(
        isinstance(mark, OneOf) for mark in annotation.__metadata__
    )


def _annotation(model: type[BaseModel], name: str) -> Any:
    """Return a field's type with its mark: pydantic keeps the two apart."""
    field = model.model_fields[name]
    marks = [mark for mark in field.metadata if isinstance(mark, OneOf)]
    return Annotated[field.annotation, marks[0]] if marks else field.annotation


def _is_mapping(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict or any(
        typing.get_origin(part) is dict for part in typing.get_args(annotation)
    )


def sentence(detail: ErrorDetails, origin: str, not_imported: list[str]) -> str:
    """Return a sentence about one error.

    Args:
        origin: of the recipe.
        not_imported: plugins that the recipe names and nobody trusts.
    """
    location = detail["loc"]
    dotted, fields = _walk(location)
    if detail["type"] == WRONG_NUMBER:
        # Found by the section, which pydantic names as the place.
        prefix = f"{dotted}." if location else ""
        return f"{origin}: '{prefix}{detail['ctx']['field']}': {detail['msg']}"
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), fields, n=2)
        hint = f"it takes {', '.join(fields)}"
        if near:
            hint = "did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
        return f"{origin}: unknown field '{dotted}': {hint}"
    if detail["type"] == "missing":
        return f"{origin}: '{dotted}' is missing"
    plugins = " or ".join(not_imported)
    if detail["type"] == "union_tag_invalid":
        kind = f"{origin}: '{dotted}.kind' is '{detail['ctx']['tag']}'"
        expected = detail["ctx"]["expected_tags"]
        if not_imported:
            return (
                f"{kind}, which is a part of the plugin {plugins}, which the checkpoint names: "
                f"{trust_remedy(not_imported)}"
            )
        if not expected:
            return (
                f"{kind}, and there is no such kind: "
                "name the module that defines it under 'plugins'"
            )
        return f"{kind}, but it is one of {expected}"
    # Any other error comes with a message; pydantic puts this before those of validators.
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "literal_error" and not_imported:
        message += (
            f", or of the plugin {plugins}, which the checkpoint names: "
            f"{trust_remedy(not_imported)}"
        )
    # A whole section would be too long for a sentence.
    value = detail.get("input")
    shown = f" (got {value!r})" if isinstance(value, str | int | float | bool) else ""
    return f"{origin}: '{dotted}': {message}{shown}"
