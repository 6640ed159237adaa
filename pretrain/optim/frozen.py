"""The parameters that a phase's ``frozen`` names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from pretrain.core.errors import ConfigError
from pretrain.model.config import ModelConfig
from pretrain.model.moe.config import Role

# Roles of MoE tensors -> names that ``frozen`` may use; a residual expert is a feed-forward.
MOE_PARTS = {
    Role.ROUTER: "router",
    Role.SHARED_EXPERT: "shared_experts",
    Role.SHARED_GATE: "shared_experts",
    Role.EXPERT: "experts",
    Role.EXPERT_BIAS: "experts",
}
# The other parts, by patterns of parameter names; the first match counts.
OTHER_PARTS: dict[str, tuple[str, ...]] = {
    "embedding": ("embedding.*", "position.*"),
    "head": ("head.*",),
    "attention": ("*.attention.*",),
    "norm": ("*norm.weight", "*norm.bias"),
    "feed_forward": ("*.feed_forward.*",),
}
PARTS = {*MOE_PARTS.values(), *OTHER_PARTS}


def part_of(name: str, model: ModelConfig) -> str | None:
    """The part of the model that a parameter belongs to.

    None for the few in no part, such as the projection of multi-token prediction.
    """
    role = model.moe_role(name)
    if role in MOE_PARTS:
        return MOE_PARTS[role]
    return next(
        (
            part
            for part, patterns in OTHER_PARTS.items()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        ),
        None,
    )


def frozen_parameters(
    names: Iterable[str], patterns: Sequence[str], model: ModelConfig, where: str
) -> set[str]:
    """The names of the parameters that ``patterns`` match.

    Args:
        names: of all parameters of ``model``.
        patterns: names of ``PARTS``, or patterns of parameter names with ``*``, ``?`` and ``[]``.
        where: the recipe's field, for error sentences.

    Raises:
        ConfigError: for a pattern that no parameter matches, with the nearest names.
    """
    parts = {name: part_of(name, model) for name in names}
    found: set[str] = set()
    for pattern in patterns:
        matched = {
            name for name, part in parts.items() if part == pattern or fnmatchcase(name, pattern)
        }
        if not matched:
            # Close matches are sought among parts and parameter names alike.
            have = sorted({part for part in parts.values() if part}) + list(parts)
            near = get_close_matches(pattern, have, n=2)
            hint = (
                "did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
                if near
                else f"the model has {', '.join(sorted(set(have) & PARTS))}"
            )
            raise ConfigError(
                f"{where} names '{pattern}', which no parameter of the model is: {hint}"
            )
        found |= matched
    return found
