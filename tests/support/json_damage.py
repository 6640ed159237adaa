"""Damages an object of JSON, one place at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

WRONG: tuple[Any, ...] = (None, True, -1, 2**70, 1.5, "x", [], [[]], {}, {"x": 1})


def damaged(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield what was done, and the object with one value at any depth removed or replaced by one of
    another type or range.
    """
    for path in _paths(content):
        *way, last = path
        for value in (..., *WRONG):
            changed = copy.deepcopy(content)
            place = changed
            for step in way:
                place = place[step]
            if value is ...:
                del place[last]
            elif type(value) is type(place[last]) and value not in (-1, 2**70):
                continue
            else:
                place[last] = value
            yield f"{'.'.join(map(str, path))} -> {value}", changed


def _paths(content: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = content.items() if isinstance(content, dict) else enumerate(content)
    for name, value in inner:
        yield (*before, name)
        if isinstance(value, dict | list):
            yield from _paths(value, (*before, name))
