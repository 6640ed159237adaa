"""Which parameters a phase's ``frozen`` stands for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from pretrain.core.errors import ConfigError

# A part of the model: patterns of its parameters' names. Later parts take what earlier ones leave, so that each parameter is in one.
PARTS: dict[str, tuple[str, ...]] = {
    "embedding": ("embedding.*", "position.*"),
    "head": ("head.*",),
    "router": ("*.router.*", "*.retrieval.*", "*.gate.wg.*"),
    "shared_experts": ("*.feed_forward.shared.*",),
    "experts": ("*.experts.*", "*.feed_forward.b1", "*.feed_forward.b2", "*.feed_forward.b3"),
    "attention": ("*.attention.*",),
    "norm": ("*norm.weight", "*norm.bias"),
    "feed_forward": ("*.feed_forward.*",),
}


def part_of(name: str) -> str | None:
    """The part of the model that a parameter belongs to; None for the few that are in none, such as the join of multi-token prediction."""
    return next(
        (
            part
            for part, patterns in PARTS.items()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        ),
        None,
    )


def frozen_parameters(names: Iterable[str], patterns: Sequence[str], where: str) -> set[str]:
    """The parameters that ``patterns`` stand for.

    Args:
        names: of all parameters.
        patterns: names of ``PARTS``, or patterns of parameter names with ``*``, ``?`` and ``[]``.
        where: the recipe's field, for sentences.

    Raises:
        ConfigError: for a pattern that no parameter matches, with the nearest ones.
    """
    parts = {name: part_of(name) for name in names}
    found: set[str] = set()
    for pattern in patterns:
        matched = {
            name for name, part in parts.items() if part == pattern or fnmatchcase(name, pattern)
        }
        if not matched:
            have = sorted({part for part in parts.values() if part}) + list(parts)
            near = get_close_matches(pattern, have, n=2)
            hint = (
                "did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
                if near
                else f"the model has {', '.join(sorted(set(have) & set(PARTS)))}"
            )
            raise ConfigError(
                f"{where} names '{pattern}', which no parameter of the model is: {hint}"
            )
        found |= matched
    return found
