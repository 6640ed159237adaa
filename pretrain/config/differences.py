"""In what two models differ, field by field, and what each difference means for weights that are
taken from one to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic.fields import FieldInfo

from pretrain.core.section import Effect, Section
from pretrain.model.config import ModelConfig

SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True)
class Difference:
    """A field that two models have with other values.

    Attributes:
        path: in a recipe, such as ``model.position.rope_theta``; of two kinds of a part,
            ``model.position.kind``.
        values: of the first and of the second model, as shown to a user.
        effect: what the second value does to the weights of the first.
        is_kind: whether the two are of other kinds, so that what is inside cannot be compared.
    """

    path: str
    values: tuple[str, str]
    effect: Effect
    is_kind: bool = False


def mark_of(field: FieldInfo, inherited: Effect) -> Effect:
    """The effect that a field's type is marked with, or else that of its section."""
    return next((mark for mark in field.metadata if isinstance(mark, Effect)), inherited)


def differences(first: ModelConfig, second: ModelConfig) -> list[Difference]:
    """Every field of the schema in which two models differ, in its order.

    What no layer reads does not count, and what only one of them has layers for is shown by
    ``model.layer_pattern``.
    """
    models = (first, second)
    changed: dict[str, Any] = {}
    if not all(model.routed_layers for model in models):
        changed["moe"] = None
    if any(len(model.moe_layers) == model.num_hidden_layers for model in models):
        changed["intermediate_size"] = None
    if first.moe_layers == second.moe_layers:
        changed["layer_pattern"] = first.layer_pattern
    one, other = (_with_joined_shared_experts(model.model_copy(update=changed)) for model in models)
    return list(_differences(one, other, "model", Effect.MEANING))


def _with_joined_shared_experts(model: ModelConfig) -> ModelConfig:
    """The model with its shared experts as the one feed-forward that they are."""
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
        if effect is Effect.MEANING and second.keeps_the_meaning_of(first):
            effect = Effect.FUNCTION
        yield Difference(f"{path}.kind", kinds, effect, is_kind=True)
        return
    for name, field in type(first).model_fields.items():
        values, mark = (getattr(first, name), getattr(second, name)), mark_of(field, effect)
        if all(isinstance(value, Section) for value in values):
            yield from _differences(*values, f"{path}.{name}", mark)
        elif values[0] != values[1]:
            yield Difference(f"{path}.{name}", (_shown(values[0]), _shown(values[1])), mark)


def _shown(value: Any) -> str:
    """A value as a recipe says it; of a section, its kind."""
    if isinstance(value, Section):
        return str(getattr(value, "kind", "set"))
    return (
        str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    )


def with_field(model: ModelConfig, source: ModelConfig, path: str) -> ModelConfig:
    """``model`` with the one field at ``path`` (as :class:`Difference` has it) as in ``source``.

    Nothing is checked.
    """
    return _with_field(model, source, path.removeprefix("model.").removesuffix(".kind").split("."))


def _with_field(section: SectionT, source: Section, names: list[str]) -> SectionT:
    name, *below = names
    value = getattr(source, name)
    if below:
        value = _with_field(getattr(section, name), value, below)
    return section.model_copy(update={name: value})
