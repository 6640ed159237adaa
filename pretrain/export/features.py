"""What an architecture supports, as a white list of the fields of a recipe's model.

A feature that nobody thought of is thereby a reason against the export, and not lost in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from pretrain.config.differences import mark_of
from pretrain.core.section import Effect, Section
from pretrain.model.config import ModelConfig

ANY = None
"""In a white list: whatever the field says."""

# Fields of an expert's capacity, which matters only if tokens are dropped, and every architecture
# refuses models that drop tokens.
# The two gates differ in their names alone.
WITHOUT_DROPS = frozenset(
    {"moe.eval_capacity_factor", "moe.min_capacity", "moe.use_rts", "moe.gate"}
)

Takes = Mapping[str, Collection[Any] | None]


def reasons_against(model: ModelConfig, takes: Takes, name: str) -> list[str]:
    """A clause for each field of ``model`` that the architecture ``name`` cannot follow.

    A field that ``takes`` does not name must be at its default, and one that it names must be among
    its values. The section of experts does not count if no layer has any.
    """
    reasons = []
    for path, value, field in _fields(model, "", Effect.MEANING):
        if path in WITHOUT_DROPS or (path.startswith("moe.") and not model.moe_layers):
            continue
        if path in takes:
            allowed = takes[path]
            if allowed is not None and value not in allowed:
                only = " or ".join(_shown(one) for one in allowed)
                reasons.append(f"model.{path} is {_shown(value)}, and {name} has only {only}")
        # A new field of the schema has a default, and only other values are refused.
        elif field.is_required() or value != field.get_default():
            reasons.append(f"model.{path} is {_shown(value)}, and {name} has nothing for it")
    return reasons


def _fields(section: Section, prefix: str, effect: Effect) -> Iterator[tuple[str, Any, FieldInfo]]:
    """Path, value and declaration of each field that a finished model depends on.

    A section is replaced by its fields; an optional one also counts as a value itself.
    """
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        mark = mark_of(field, effect)
        optional = (
            field.get_default() is None and not field.is_required() and prefix + name != "moe"
        )
        if mark is Effect.NONE:
            continue
        if isinstance(value, Section) and not optional:
            yield from _fields(value, f"{prefix}{name}.", mark)
        elif name != "moe":
            yield f"{prefix}{name}", value, field


def _shown(value: Any) -> str:
    if isinstance(value, Section):
        return "set"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
