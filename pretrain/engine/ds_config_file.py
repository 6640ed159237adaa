"""Reads a ds_config's JSON strictly: no key twice, no NaN, errors with line and column."""

from __future__ import annotations

import json
from typing import Any

from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it is written, before its keys are known to differ."""


def parse_ds_config(text: str, origin: str) -> JsonObject:
    """Return the JSON object in ``text``.

    Args:
        origin: of the text, for error sentences.

    Raises:
        ConfigError: if it is not a JSON object, or a key is there twice; with line and column, or
            the key's path.
    """

    def refuse_constant(name: str) -> float:
        raise ConfigError(f"{origin} is not valid JSON: {name} is no number of JSON; use a number")

    try:
        content = json.loads(text, object_pairs_hook=_Pairs, parse_constant=refuse_constant)
        plain = _without_pairs(content, origin, "")
    except json.JSONDecodeError as error:
        place = f"{error.msg}, line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{origin} is not valid JSON: {place}{_hint(text, error.pos)}") from None
    # Integers of thousands of digits, and objects in each other thousands deep.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin} is not valid JSON that can be read: {error}") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"{origin} must hold a JSON object, as ds_configs/zero1.json does")
    return plain


def _without_pairs(value: Any, origin: str, path: str) -> Any:
    """Return the value with plain dictionaries; a key that is there twice is refused."""
    if isinstance(value, _Pairs):
        result: JsonObject = {}
        for key, below in value:
            where = f"{path}.{key}" if path else key
            if key in result:
                raise ConfigError(
                    f"{origin}: '{where}' is there twice, and only one of them could hold: "
                    "remove one"
                )
            result[key] = _without_pairs(below, origin, where)
        return result
    if isinstance(value, list):
        return [
            _without_pairs(entry, origin, f"{path}[{number}]") for number, entry in enumerate(value)
        ]
    return value


def _hint(text: str, place: int) -> str:
    """What to do about a text that only DeepSpeed's own reader takes.

    Args:
        place: of the character that JSON does not have there.
    """
    rest = text[place:].lstrip()
    line = text[text.rfind("\n", 0, place) + 1 :].split("\n", 1)[0]
    if rest.startswith(("//", "/*", "#")) or line.lstrip().startswith(("//", "/*", "#")):
        return (
            "; JSON has no comments: take them out (DeepSpeed's own reader takes HJSON, but the "
            "file is copied into the run's folder as JSON)"
        )
    # Python's message names the comma, or what follows it, by version.
    if text[:place].rstrip().endswith(",") and rest.startswith(("}", "]")):
        return "; take out the comma before it"
    return ""
