"""In what two models differ, and what that means for the weights of one in the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic.fields import FieldInfo

from pretrain.core.files import JsonObject
from pretrain.core.section import Effect, Section
from pretrain.model.config import ModelConfig

SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True)
class Difference:
    """A field whose values differ in two models.

    Attributes:
        path: in a recipe, such as ``model.position.rope_theta``; if the kinds differ,
            ``model.position.kind``.
        values: of the first and of the second model, as shown to a user.
        effect: what the second value does to the weights of the first.
        is_kind: whether the kinds differ, so that their fields cannot be compared.
    """

    path: str
    values: tuple[str, str]
    effect: Effect
    is_kind: bool = False


def mark_of(field: FieldInfo, inherited: Effect) -> Effect:
    """Return the effect that a field's type is marked with, or else that of its section."""
    return next((mark for mark in field.metadata if isinstance(mark, Effect)), inherited)


def differences(first: ModelConfig, second: ModelConfig) -> list[Difference]:
    """Return every field in which two models differ, in the order of the schema.

    Fields that no layer of a model reads do not count. If only one model has layers for a section,
    the difference is that of ``model.layer_pattern``.
    """
    models = (first, second)
    changed: dict[str, object] = {}
    # Take the fields out that a model does not read: their values mean nothing.
    if not all(model.routed_layers for model in models):
        changed["moe"] = None
    if any(len(model.moe_layers) == model.num_hidden_layers for model in models):
        changed["intermediate_size"] = None
    if first.moe_layers == second.moe_layers:
        changed["layer_pattern"] = first.layer_pattern
    one, other = (_with_joined_shared_experts(model.model_copy(update=changed)) for model in models)
    return list(_differences(one, other, "model", Effect.MEANING))


def _with_joined_shared_experts(model: ModelConfig) -> ModelConfig:
    """Return the model with its shared experts joined: together they are one feed-forward."""
    if model.moe is None:
        return model
    width = model.moe.shared_width
    shared = {"num_shared_experts": min(width, 1), "shared_intermediate_size": width or None}
    gate = {"shared_expert_gate": model.moe.shared_expert_gate and width > 0}
    return model.model_copy(update={"moe": model.moe.model_copy(update=shared | gate)})


def _differences(
    first: Section, second: Section, path: str, effect: Effect
) -> Iterator[Difference]:
    if type(first) is not type(second):
        kinds = (_shown(first), _shown(second))
        # Such as rope and yarn, which rotate by other angles, or two kinds of routers.
        if effect is Effect.MEANING and second.keeps_the_meaning_of(first):
            effect = Effect.FUNCTION
        yield Difference(f"{path}.kind", kinds, effect, is_kind=True)
        return
    for name, field in type(first).model_fields.items():
        values = (getattr(first, name), getattr(second, name))
        mark = mark_of(field, effect)
        if all(isinstance(value, Section) for value in values):
            yield from _differences(*values, f"{path}.{name}", mark)
        elif values[0] != values[1]:
            yield Difference(f"{path}.{name}", (_shown(values[0]), _shown(values[1])), mark)


def _shown(value: Any) -> str:
    """Return a value as a recipe has it; of a section, its kind."""
    if isinstance(value, Section):
        return str(getattr(value, "kind", "set"))
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def with_field(model: ModelConfig, source: ModelConfig, path: str) -> ModelConfig:
    """Return ``model`` with one field as in ``source``; nothing is checked.

    Args:
        path: of the field, as :class:`Difference` has it.
    """
    return _with_field(model, source, path.removeprefix("model.").removesuffix(".kind").split("."))


def _with_field(section: SectionT, source: Section, names: list[str]) -> SectionT:
    name, *below = names
    value = getattr(source, name)
    if below:
        value = _with_field(getattr(section, name), value, below)
    return section.model_copy(update={name: value})


def dotted_fields(section: JsonObject, prefix: str = "") -> JsonObject:
    """Return the values of nested sections by their dotted names."""
    found: JsonObject = {}
    for key, value in section.items():
        if isinstance(value, dict):
            found |= dotted_fields(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
