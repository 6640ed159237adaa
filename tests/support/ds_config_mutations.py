"""Random mutations of the shipped ds_configs: typing errors, wrong values, misplaced keys."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

from pretrain.engine.ds_config import read_ds_config
from pretrain.engine.ds_config_check import key_paths
from tests.support.paths import DS_CONFIGS

VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, 1.5, 2**70, 1e400, float("nan"), "", "auto", "two", "cpu",
    "1", [], [1], ["a"], {}, {"enabled": True}, {"a": {"b": {}}},
]  # fmt: skip


def mutated(source: random.Random, base: dict[str, Any]) -> dict[str, Any]:
    """A ds_config with one to three typing errors, wrong values or misplaced keys."""
    ds_config = copy.deepcopy(base)
    for _ in range(source.randint(1, 3)):
        path = source.choice(key_paths()).split(".")
        section = ds_config
        for key in path[:-1]:
            below = section.get(key)
            section[key] = below = below if isinstance(below, dict) else {}
            section = below
        key = path[-1]
        kind = source.randrange(3)
        if kind == 0:
            at = source.randrange(len(key))
            key = key[:at] + source.choice(["", "x", key[at] * 2]) + key[at + 1 :]
        if kind == 1:
            section = ds_config
        section[key] = source.choice(VALUES)
    return ds_config


def mutations(number: int) -> Iterator[dict[str, Any]]:
    source = random.Random(number)
    bases = [read_ds_config(str(path)) for path in sorted(DS_CONFIGS.glob("*.json"))]
    for _ in range(number):
        yield mutated(source, source.choice(bases))
