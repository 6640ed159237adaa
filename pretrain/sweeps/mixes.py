"""Data mixtures as an axis, from a file of the user's own data sets.

The file has the fields of a recipe's ``data`` section that all runs share, and named mixtures::

    data:
      corpora: {web: data/web, code: data/code}    # or path: and sources:
    mixes:
      web: {web: 0.8, code: 0.2}
      balanced: {web: 0.5, code: 0.5}
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pretrain.config.load import parse_yaml
from pretrain.core.errors import ConfigError

AXIS = "data_mix"
# Fields of the data section of which only one may be given.
ALTERNATIVES = {"source": "sources", "sources": "source", "path": "corpora", "corpora": "path"}


def read_custom_datasets(path: str) -> tuple[list[str], dict[str, object]]:
    """Read a file of data sets.

    Returns:
        Overrides for every run, and the values of the axis ``data_mix``. The base recipe, which
        may name other sources, gets the first mixture.

    Raises:
        ConfigError: if it is no such file, or a mixture names a source that it does not have.
    """
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"), path)
    except OSError as error:
        raise ConfigError(
            f"--custom-datasets {path} cannot be read ({error.strerror}): give a YAML file with"
            " 'data:' and 'mixes:'"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"--custom-datasets {path} is not UTF-8 text: give a YAML file with 'data:' and"
            " 'mixes:'"
        ) from None
    if not isinstance(content, dict) or content.keys() - {"data", "mixes"}:
        raise ConfigError(
            f"--custom-datasets {path} has other keys than 'data' and 'mixes': write fields of the"
            " recipe's data section under the one, and named mixtures under the other"
        )
    data = content.get("data") or {}
    mixes = content.get("mixes")
    if not isinstance(data, dict) or not isinstance(mixes, dict) or not mixes:
        raise ConfigError(
            f"--custom-datasets {path} has no named mixtures: write 'mixes: {{web: {{c4: 0.8, code:"
            " 0.2}}'"
        )
    values = {
        str(name): {"data.mixture": _mixture(path, str(name), mix, data)}
        for name, mix in mixes.items()
    }
    given = {field: data[field] for field in data}
    given |= {
        other: None
        for field in data
        if (other := ALTERNATIVES.get(field)) is not None and other not in data
    }
    given.setdefault("mixture", next(iter(values.values()))["data.mixture"])
    try:
        overrides = [f"data.{field}={json.dumps(value)}" for field, value in given.items()]
    except TypeError as error:
        raise ConfigError(
            f"--custom-datasets {path}: data has a value that is neither text nor number ({error}):"
            " put it in quotes"
        ) from None
    return overrides, dict(values)


def _mixture(path: str, name: str, mix: object, data: dict[str, Any]) -> dict[str, object]:
    where = f"--custom-datasets {path}: mixes.{name}"
    if not isinstance(mix, dict) or not mix:
        raise ConfigError(f"{where} names no source: write it as {{SOURCE: SHARE, ...}}")
    for source, share in mix.items():
        if (
            isinstance(share, bool)
            or not isinstance(share, int | float)
            or not 0 <= share < math.inf
        ):
            raise ConfigError(f"{where}: the share of {source} is {share!r}: give a number from 0")
    known = data.get("sources") or data.get("corpora")
    if isinstance(known, dict) and (strange := sorted(map(str, mix.keys() - known.keys()))):
        raise ConfigError(f"{where} names {strange[0]}, but there are {', '.join(map(str, known))}")
    return {"kind": "weights", "weights": {str(source): share for source, share in mix.items()}}
