"""Checks a ds_config key by key, before anything is started."""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject
from pretrain.engine.ds_config_keys import (
    ELSEWHERE,
    INSTEAD,
    OWNED_BY_RECIPE,
    REFUSED,
    REMOVED,
    DsConfig,
)

AUTO = "auto"
# DeepSpeed puts sizes and counts into tensors of 64 bits.
LARGEST = 2**63 - 1
# More would be no sentence any more.
MOST_SHOWN = 5
NUMBERS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def check_ds_config(content: JsonObject, origin: str) -> None:
    """Check each key, its type and its range.

    Args:
        origin: of the ds_config, for error sentences.

    Raises:
        ConfigError: with the path of each wrong key, and what to write instead.
    """
    problems = list(_section_problems(content, DsConfig, ""))
    if len(problems) > MOST_SHOWN:
        more = len(problems) - MOST_SHOWN
        problems = [*problems[:MOST_SHOWN], f"and {more} more"]
    if problems:
        raise ConfigError(f"{origin}: {'; '.join(problems)}")


def key_paths(model: type[BaseModel] = DsConfig, prefix: str = "") -> list[str]:
    """Return the dotted path of every key that a ds_config may have."""
    paths = []
    for key, field in _fields(model).items():
        paths.append(f"{prefix}{key}")
        for below in _models(field.annotation):
            paths += key_paths(below, f"{prefix}{key}.")
    return paths


def is_refused(path: str) -> bool:
    """Whether the key, or a section above it, is one that this pipeline does not take."""
    parts = path.split(".")
    return any(".".join(parts[: end + 1]) in REFUSED for end in range(len(parts)))


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields by every name that a file may use for them."""
    names = dict(model.model_fields)
    for field in model.model_fields.values():
        # DeepSpeed's models take both the name and its alias.
        if field.alias is not None:
            names[field.alias] = field
    return names


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [model for part in typing.get_args(annotation) for model in _models(part)]
    return []


def _section_problems(section: JsonObject, model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Yield a sentence for each key of a section that is wrong."""
    fields = _fields(model)
    for key, value in section.items():
        path = f"{prefix}{key}"
        field = fields.get(key)
        if path in REMOVED:
            yield _removed(path)
        elif field is None:
            yield _unknown(path, key, list(fields))
        elif path in REFUSED:
            if not _asks_for_nothing(value, field):
                yield f"'{path}' is refused: {REFUSED[path]}"
        elif (new := _replacement(field)) is not None:
            yield f"'{path}' is an old name in DeepSpeed: write {new}"
        elif value == AUTO and path in OWNED_BY_RECIPE:
            continue
        else:
            # DeepSpeed leaves out "auto" in the sections that it describes, but not the stage.
            in_model = model.__module__.startswith("deepspeed.") and not _models(field.annotation)
            if value == AUTO and in_model and path != "zero_optimization.stage":
                continue
            yield from _value_problems(value, field.annotation, field.metadata, path)


def _replacement(field: FieldInfo) -> str | None:
    """Return what DeepSpeed calls a deprecated field by now; None for other fields."""
    extra = field.json_schema_extra
    if not isinstance(extra, dict) or not extra.get("deprecated"):
        return None
    return f"'{extra.get('new_param')}'"


def _asks_for_nothing(value: Any, field: FieldInfo) -> bool:
    """Whether a refused key is DeepSpeed's default, or a section that is switched off."""
    if isinstance(value, dict):
        return value.get("enabled", None) is False or not value
    default = field.get_default(call_default_factory=True)
    return type(value) is type(default) and bool(value == default)


def _removed(path: str) -> str:
    reason = " ".join(REMOVED[path].split()).split(". ")[0].rstrip(".")
    hint = INSTEAD.get(path, "leave it out")
    return f"'{path}' is refused: DeepSpeed says \"{reason}\": {hint}"


def _unknown(path: str, key: str, siblings: list[str]) -> str:
    """Return a sentence with the nearest key: in the same section, else anywhere."""
    if path in ELSEWHERE:
        return f"'{path}' is no key of DeepSpeed's training: {ELSEWHERE[path]}"
    start = path.removesuffix(key)
    near = [f"{start}{name}" for name in difflib.get_close_matches(key, siblings, n=1)]
    if not near:
        # The right key in the wrong section.
        near = [known for known in key_paths() if known.rsplit(".", 1)[-1] == key][:1]
    hint = f"did you mean '{near[0]}'?" if near else "DeepSpeed reads no such key: leave it out"
    return f"unknown key '{path}': {hint}"


def _value_problems(
    value: Any, annotation: Any, marks: typing.Sequence[Any], path: str
) -> Iterator[str]:
    """Yield what is wrong with a value of a type, and with what is below it."""
    for model in _models(annotation):
        if isinstance(value, dict):
            yield from _section_problems(value, model, f"{path}.")
            return
    if not _is_of(value, annotation):
        yield f"'{path}' is {_shown(value)}; it must be {_described(annotation, marks, path)}"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not _in_range(value, marks):
            yield f"'{path}' is {_shown(value)}; it must be {_described(annotation, marks, path)}"
        elif abs(value) > LARGEST:
            yield f"'{path}' is {_shown(value)}, which no counter of 64 bits holds: lower it"


def _is_of(value: Any, annotation: Any) -> bool:
    """Whether a value of JSON is one of a type: stricter than pydantic, which takes true for 1."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, part) for part in typing.get_args(annotation))
    if origin is typing.Annotated:
        inner, *marks = typing.get_args(annotation)
        marks = [mark for info in marks for mark in getattr(info, "metadata", [info])]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return _is_of(value, inner) and (not is_number or _in_range(value, marks))
    if origin is typing.Literal:
        return any(
            value == choice and type(value) is type(choice) for choice in _choices(annotation)
        )
    if origin is list:
        return isinstance(value, list) and all(
            _is_of(entry, part) for part in typing.get_args(annotation) for entry in value
        )
    if annotation is Any:
        return True
    if annotation is type(None):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    # DeepSpeed's own examples write 5e8 for a count.
    if annotation is int:
        return not isinstance(value, bool) and (
            isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        )
    if annotation is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (isinstance(value, int) or math.isfinite(value))
    return _is_of_class(value, annotation, origin)


def _is_of_class(value: Any, annotation: Any, origin: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return not isinstance(value, bool | float) and value in _choices(annotation)
    if annotation in (str, Path):
        return isinstance(value, str) and "\0" not in value
    if annotation is list:
        return isinstance(value, list)
    if annotation is dict or origin is dict:
        return isinstance(value, dict)
    # A section, which is not of this type unless it is an object; other classes have no JSON.
    return False


def _choices(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        # Names that only mark the end of a list have the value of another.
        return [member.value for member in annotation]
    return list(typing.get_args(annotation))


def _in_range(value: float, marks: typing.Sequence[Any]) -> bool:
    for mark in marks:
        if isinstance(mark, annotated_types.Ge) and value < mark.ge:  # type: ignore[operator]
            return False
        if isinstance(mark, annotated_types.Gt) and value <= mark.gt:  # type: ignore[operator]
            return False
        if isinstance(mark, annotated_types.Le) and value > mark.le:  # type: ignore[operator]
            return False
        if isinstance(mark, annotated_types.Lt) and value >= mark.lt:  # type: ignore[operator]
            return False
    return True


def _described(annotation: Any, marks: typing.Sequence[Any], path: str) -> str:
    """Return what a value of this type looks like, in words."""
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [
        f"{words} {getattr(mark, sign):g}"
        for mark in [*marks, *_inner_marks(annotation)]
        for sign, words in signs.items()
        if hasattr(mark, sign)
    ]
    words = _type_in_words(annotation)
    null = " or null" if words.endswith(" or null") else ""
    auto = ' or "auto"' if path in OWNED_BY_RECIPE else ""
    return f"{words.removesuffix(null)} {' and '.join(bounds)}".strip() + null + auto


def _inner_marks(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        marks = typing.get_args(annotation)[1:]
        return [mark for info in marks for mark in getattr(info, "metadata", [info])]
    return [mark for part in typing.get_args(annotation) for mark in _inner_marks(part)]


def _type_in_words(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        words = [_type_in_words(part) for part in typing.get_args(annotation)]
        return " or ".join(dict.fromkeys(words))
    if origin is typing.Annotated:
        return _type_in_words(typing.get_args(annotation)[0])
    if origin is typing.Literal or (isinstance(annotation, type) and issubclass(annotation, Enum)):
        names = [json.dumps(choice) for choice in dict.fromkeys(_choices(annotation))]
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    if annotation is type(None):
        return "null"
    if annotation in NUMBERS:
        return NUMBERS[annotation]
    if annotation is Path:
        return "a path"
    if annotation is list or origin is list:
        return " of ".join(["a list", *map(_type_in_words, typing.get_args(annotation))])
    return "an object {...}"


def _shown(value: Any) -> str:
    """Return a value as JSON writes it, shortened."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        value = json.dumps(value)
        return f"the list {value}" if len(value) <= 40 else "a list"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
