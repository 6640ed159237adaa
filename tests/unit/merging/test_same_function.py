"""Two recipes that differ in one field: either the same weights compute the same in both, or a
merge of them is refused.

Generated over every field of the model's schema, in every case of it that the contract tests know;
the judge is the forward pass.
"""

from __future__ import annotations

import types
import typing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pretrain.checkpoint.comparison import check_same_function
from pretrain.config.differences import differences, mark_of
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.registry import NameOf, kinds_of
from pretrain.core.section import Effect, Section
from pretrain.model.attention.config import Attention
from pretrain.model.config import (
    Dropout,
    FeedForwardConfig,
    LayerPattern,
    ModelConfig,
    MultiTokenPrediction,
    Norm,
)
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.model.init_config import BaseWidths, Initialization
from pretrain.model.moe.config import BiasBalancing, MoE
from pretrain.model.moe.routers import ExpertGroups, Router
from pretrain.model.positions.config import Position
from tests.support.model_kinds import CASES, LATENT
from tests.support.tiny_model import random_tokens, tiny_config

Fields = set[tuple[type[Section], str]]
NATIVE = "model.moe.kind=deepspeed"
FULL = ["model.moe.causal=false", "model.moe.eval_capacity_factor=0.5"]
BASE = (
    "hidden_size: 16, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 4,"
    " moe_intermediate_size: 16"
)
YARN = "kind: yarn, rope_theta: 100, factor: 4, original_max_position_embeddings: 256, beta_fast: 2"
MORE: dict[str, list[str]] = {
    "experts that are full": [NATIVE, *FULL],
    "experts that are full, our router": [NATIVE, "model.moe.gate=router", *FULL],
    "experts that are full, one choice": [NATIVE, *FULL, "model.moe.top_k=1"],
    "a residual expert": [NATIVE, "model.moe.use_residual=true", "model.moe.drop_tokens=false"],
    "one choice": ["model.moe.top_k=1"],
    "mup": [f"model.initialization={{kind: mup, base: {{{BASE}}}}}"],
    "yarn and latent attention": [
        f"model.position={{{YARN}, mscale: 1.0, mscale_all_dim: 0.5}}",
        f"model.attention={{kind: mla, num_attention_heads: 4, {LATENT}}}",
        "model.attention.qk_rope_head_dim=16",
    ],
    "yarn": [f"model.position={{{YARN}}}"],
    "latent attention with plain queries": [
        f"model.attention={{kind: mla, num_attention_heads: 4, {LATENT}}}",
        "model.attention.q_lora_rank=null",
        "model.attention.sliding_window=5",
        "model.attention.full_attention_every=2",
    ],
    "shared experts in DeepSpeed's layer": [
        NATIVE,
        "model.moe.drop_tokens=false",
        "model.moe.num_shared_experts=2",
        "model.moe.shared_intermediate_size=8",
    ],
    "a width for shared experts": [
        "model.moe.num_shared_experts=2",
        "model.moe.shared_intermediate_size=8",
    ],
    "a small clamp": ["model.feed_forward={kind: clamped_swiglu, limit: 0.1}"],
    "balancing by bias": ["model.moe.bias_balancing={}"],
}
ALL = MORE | CASES
# Cases in which a field that is not compared is judged: the first of them have full experts.
JUDGED = 4
# Fields whose only other value from null is one that this test has to know.
FROM_NULL: dict[str, Any] = {
    "sliding_window": 5,
    "full_attention_every": 2,
    "attention_factor": 2.0,
    "bias_balancing": BiasBalancing(),
    "groups": ExpertGroups(num_groups=2, top_k_groups=1),
    "multi_token_prediction": MultiTokenPrediction(), "deduplicate": True,
}  # fmt: skip
# Kernels that need a GPU, a package or a compiler; tests of kernels compare them.
ELSEWHERE = {"flex", "varlen", "flash", "flash_mla", "triton"}
# They change the function without changing these logits: this one is how long a text may be.
UNSEEN = {"max_position_embeddings"}


@dataclass(frozen=True)
class Variation:
    """A model, another one that differs in one field, and which field that is."""

    case: str
    model: ModelConfig
    other: ModelConfig
    section: type[Section]
    field: str


def schema_fields() -> Fields:
    families = (
        Attention,
        Position,
        Norm,
        FeedForwardConfig,
        LayerPattern,
        Initialization,
        MoE,
        Router,
    )
    sections = [ModelConfig, Dropout, MultiTokenPrediction, ExpertGroups, BiasBalancing, BaseWidths]
    sections += [kind for family in families for kind in kinds_of(family)]
    return {
        (section, name) for section in sections for name in section.model_fields if name != "kind"
    }


def other_values(annotation: Any, name: str, value: Any) -> Iterator[Any]:
    """Other values of a field, some of which its section may refuse."""
    if value is None:
        yield FROM_NULL.get(name)
        yield from _inside(annotation, name)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, str):
        yield from _inside(annotation, name)
    elif isinstance(value, int | float):
        yield from (
            value * 2,
            value + 1,
            value / 2 if isinstance(value, float) else value // 2,
            value + 0.5,
        )
    elif isinstance(value, tuple):
        yield tuple(reversed(value))
    elif isinstance(value, Section):
        yield None


def _inside(annotation: Any, name: str) -> Iterator[Any]:
    """The words of a Literal, or numbers for a number that may be left out."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        yield from (word for word in typing.get_args(annotation) if word not in ELSEWHERE)
    elif origin in (typing.Union, types.UnionType, typing.Annotated):
        for part in typing.get_args(annotation):
            yield from _inside(part, name)
    elif annotation in (int, float):
        yield from (annotation(4), annotation(32))


def variations(case: str) -> Iterator[Variation]:
    model = tiny_config(*ALL[case])
    for other, section, field in _varied(model):
        yield Variation(case, model, other, section, field)


def _varied(section: Section) -> Iterator[tuple[Any, type[Section], str]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if name == "kind":
            continue
        if isinstance(value, Section):
            for inner, owner, changed in _varied(value):
                yield section.model_copy(update={name: inner}), owner, changed
        kinds = [
            named for mark in field.metadata if isinstance(mark, NameOf) for named in mark.names
        ]
        others = [named for named in kinds if named not in ELSEWHERE]
        for given in others or other_values(field.annotation, name, value):
            content = {each: getattr(section, each) for each in type(section).model_fields} | {
                name: given
            }
            if given == value:
                continue
            try:
                yield type(section).model_validate(content), type(section), name
            except ValidationError:
                continue


@cache
def base_weights(case: str) -> tuple[DecoderLM, Tensor]:
    """A model whose every tensor is random, biases and norms too, and its logits."""
    model = DecoderLM(tiny_config(*ALL[case])).eval()
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() <= 1 and tensor.is_floating_point():
                tensor += torch.empty_like(tensor).uniform_(0.0, 0.3, generator=generator)
    return model, logits(model)


@torch.inference_mode()
def logits(model: DecoderLM) -> Tensor:
    return model.logits(random_tokens(2, 24))


def computes_the_same(variation: Variation) -> bool | None:
    """Whether the other model's logits with the same weights are equal.

    None if it cannot be computed or its tensors are others.
    """
    base, expected = base_weights(variation.case)
    try:
        other = DecoderLM(variation.other).eval()
        if _shapes(other) != _shapes(base):
            return None
        other.load_state_dict(base.state_dict())
        found = logits(other)
    except (ConfigError, ValueError, RuntimeError, AssertionError):
        return None
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=2e-5)


def _shapes(model: DecoderLM) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def is_refused(variation: Variation) -> bool:
    try:
        check_same_function([variation.model, variation.other], ["first", "second"])
    except CheckpointError as error:
        assert "first and second differ in model." in str(error)
        return True
    return False


def test_a_field_changes_no_logit_or_a_merge_refuses_it() -> None:
    seen: Fields = set()
    judged: Counter[tuple[type[Section], str]] = Counter()
    matters: Fields = set()
    for case in ALL:
        for variation in variations(case):
            key = (variation.section, variation.field)
            refused = is_refused(variation)
            seen.add(key)
            if key in matters if refused else judged[key] >= JUDGED:
                continue
            judged[key] += 1
            same = computes_the_same(variation)
            if not refused:
                assert same is not False, (
                    f"{case}: {key} changes the logits, and merges do not compare it"
                )
            elif same is not True:
                matters.add(key)
    parts = {key for key in schema_fields() - seen if _is_family(*key)}
    assert schema_fields() - seen - parts == set(), (
        "give these fields another value in FROM_NULL or a case in MORE"
    )
    exempt = {key for key in seen if _is_exempt(*key)}
    unseen = {key for key in seen - matters - exempt if key[1] not in UNSEEN}
    assert unseen == set(), (
        "these fields are compared, but change nothing in any case: is the case missing, or are"
        " they read in training only?"
    )


def _is_family(section: type[Section], name: str) -> bool:
    """Fields that hold a part, whose kinds are compared as such."""
    return any(
        name in mark
        for mark in (
            (
                "attention",
                "position",
                "norm",
                "feed_forward",
                "layer_pattern",
                "router",
                "initialization",
                "dropout",
                "base",
            ),
        )
    )


def _is_exempt(section: type[Section], name: str) -> bool:
    inside_none = section in (Dropout, MultiTokenPrediction, BaseWidths) or issubclass(
        section, Initialization
    )
    return inside_none or mark_of(section.model_fields[name], Effect.MEANING) is Effect.NONE


@pytest.mark.parametrize(
    "family", ["attention", "position", "norm", "feed_forward", "layer_pattern", "moe"]
)
def test_parts_of_other_kinds_are_refused_by_their_kind(family: str) -> None:
    models = [
        tiny_config(*overrides)
        for case, overrides in CASES.items()
        if case.startswith(f"{family}=")
    ]
    for one in models:
        for other in models:
            kinds = [getattr(model, family).kind for model in (one, other)]
            found = [
                each.path for each in differences(one, other) if each.effect is not Effect.NONE
            ]
            assert (f"model.{family}.kind" in found) == (
                kinds[0] != kinds[1]
                and (family != "layer_pattern" or one.moe_layers != other.moe_layers)
            )
