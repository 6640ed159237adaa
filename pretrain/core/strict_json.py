"""JSON files that somebody else may have written: what is wrong with them is said, never raised.

Python's parser takes a key that is there twice, names of numbers that are no JSON, and nesting that
later code cannot walk.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, NoReturn

from pretrain.core.files import JsonObject

# No JSON of this project comes near it: a manifest of 100,000 files has 15 MB.
LARGEST_BYTES = 64_000_000
DEEPEST = 64


class NotAnObject(ValueError):
    """A file holds no JSON object; the message says why, to follow the file's name."""


def read_object(path: Path, finite: bool = True) -> JsonObject:
    """Return the object in a JSON file.

    Args:
        finite: refuse NaN and infinity, which JSON does not have and Python writes all the same.

    Raises:
        NotAnObject: if the file is missing, no plain file, larger than 64 MB, not UTF-8, no JSON or
            no object; if a key is there twice, or it is nested more than 64 times.
    """
    try:
        # A pipe would block, and a device may never end.
        if not stat.S_ISREG((found := path.stat()).st_mode):
            raise NotAnObject("is no plain file")
        if found.st_size > LARGEST_BYTES:
            raise NotAnObject(f"has {found.st_size:,} bytes, which no such file has")
        content = path.read_bytes()
    except FileNotFoundError:
        raise NotAnObject("is missing") from None
    except (OSError, ValueError) as error:
        if isinstance(error, NotAnObject):
            raise
        raise NotAnObject(f"cannot be read ({error})") from None
    return parse_object(content, finite)


def parse_object(content: bytes, finite: bool = True) -> JsonObject:
    """Return the JSON object in bytes; see :func:`read_object`.

    Raises:
        NotAnObject: as :func:`read_object`.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise NotAnObject("is not UTF-8") from None
    refuse = _refuse_constant if finite else None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=refuse)
    except NotAnObject:
        raise
    except RecursionError:
        raise NotAnObject("is nested too deeply") from None
    # JSONDecodeError is one, and so is the error for a number of too many digits.
    except ValueError:
        raise NotAnObject("is not valid JSON") from None
    if not isinstance(value, dict):
        raise NotAnObject("holds no JSON object")
    if depth_of(value) > DEEPEST:
        raise NotAnObject("is nested too deeply")
    return value


def depth_of(value: Any) -> int:
    """Return how deeply lists and dictionaries are nested; 0 for a plain value."""
    # Level by level, without recursion: Python's stack is what deep nesting would use up.
    depth = 0
    level = [value]
    while level := [item for each in level for item in _items(each)]:
        depth += 1
        if depth > DEEPEST:
            break
    return depth


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _unique(pairs: list[tuple[str, Any]]) -> JsonObject:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise NotAnObject(f"has the key {twice[:80]!r} twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise NotAnObject(f"has the number {name}, which is no JSON")
