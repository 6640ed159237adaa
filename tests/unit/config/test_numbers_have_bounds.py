"""Every number of a recipe has bounds: no size runs for hours before it fails, no true is a 1."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo

from pretrain.config.error_sentences import _annotation, _models_in
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError
from pretrain.core.section import Section


def scalars(annotation: Any) -> set[Any]:
    if typing.get_origin(annotation) in (
        typing.Union, types.UnionType, typing.Annotated, list, tuple, dict
    ):  # fmt: skip
        return {kind for part in typing.get_args(annotation) for kind in scalars(part)}
    return {annotation} if isinstance(annotation, type) else set()


def sections(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    if model in seen:
        return
    seen.add(model)
    yield model
    for name in model.model_fields:
        for below in _models_in(_annotation(model, name)):
            yield from sections(below, seen)


def number_fields() -> list[tuple[str, str, FieldInfo]]:
    """Every field of a recipe that takes a number: its section, its name and itself."""
    found = []
    for model in sections(Recipe, set()):
        for name, field in model.model_fields.items():
            if scalars(field.annotation) & {int, float}:
                found.append((model.__name__, name, field))
    return found


FIELDS = number_fields()


def takes(name: str, field: FieldInfo, value: Any) -> bool:
    """Whether the field takes a value, alone in a section, itself or in a mapping or list."""
    # Alone: a section's other fields and rules are no part of the question.
    only: Any = create_model("Only", __base__=Section, **{name: (field.annotation, field)})
    for form in (value, {"a": value}, {2: value}, [value]):
        try:
            only.model_validate({name: form})
        except ValidationError:
            continue
        return True
    return False


def test_the_walk_finds_the_fields() -> None:
    names = {f"{section}.{name}" for section, name, _ in FIELDS}
    assert len(names) > 150
    assert {"ModelConfig.hidden_size", "Weights.weights", "SpikeGuard.window_steps"} <= names


@pytest.mark.parametrize("section,name,field", FIELDS, ids=lambda value: str(value)[:40])
def test_a_number_is_bounded_and_finite_and_no_truth_value(
    section: str, name: str, field: FieldInfo
) -> None:
    kinds = scalars(field.annotation)
    if bool not in kinds:
        assert not takes(name, field, True), f"{section}.{name} takes true for 1"
    if int in kinds and float not in kinds:
        for value in (2**63, -(2**64), 10**30, 1e30, 1.5):
            assert not takes(name, field, value), f"{section}.{name} takes {value}"
    for value in (float("nan"), float("inf"), float("-inf")):
        assert not takes(name, field, value), f"{section}.{name} takes {value}"


def test_the_check_of_a_field_can_fail() -> None:
    assert takes("hidden_size", FieldInfo(annotation=int), 7)
    assert takes("shares", FieldInfo(annotation=dict[str, float]), 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "override,part",
    [
        ("model.hidden_size=1000000000", "'model.hidden_size': Input should be less than"),
        ("model.hidden_size=true", "'model.hidden_size': must be a number, not true"),
        ("model.hidden_size=4.5", "'model.hidden_size': Input should be a valid integer"),
        ("model.num_hidden_layers=100000000", "less than or equal to 2048"),
        ("model.moe.num_experts=1000000000", "'model.moe.num_experts': Input should be less"),
        ("model.moe.num_experts=false", "'model.moe.num_experts': must be a number, not false"),
        ("model.vocab_size=1000000000000", "'model.vocab_size': Input should be less"),
        ("seed=-1", "'seed': Input should be greater than or equal to 0"),
        ("seed=18446744073709551616", "'seed': must fit into 64 bits"),
        ("train.sequence_length=1000000000000", "'train.sequence_length': Input should be less"),
        ("train.micro_batch_size=1000000000000000", "'train.micro_batch_size': Input should be"),
        ("train.train_tokens=1e30", "'train.train_tokens': must fit into 64 bits"),
        ("optimizer.learning_rate=.nan", "'optimizer.learning_rate': Input should be a finite"),
        ("optimizer.learning_rate=1e400", "'optimizer.learning_rate': Input should be a finite"),
        ("optimizer.learning_rate=true", "'optimizer.learning_rate': must be a number, not true"),
        ("data.mixture={kind: weights, weights: {a: true}}", "'data.mixture.weights': must be"),
        (
            "model.attention={kind: gqa, num_attention_heads: 1000000, num_key_value_heads: "
            "1000000, head_dim: 1000}",
            "model.attention has 1000000000 score elements",
        ),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_its_path(override: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("debug", [override])
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_a_whole_number_may_be_written_with_an_exponent() -> None:
    assert load_recipe("debug", ["train.train_tokens=2e4"]).train.train_tokens == 20_000
