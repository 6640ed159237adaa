"""The widths of a model: what grows when it becomes wider, and the base that muP compares it with."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError
from pretrain.model.attention.config import GroupedQueryAttention
from pretrain.model.config import ModelConfig
from pretrain.model.init_config import BaseWidths, MaximalUpdate
from pretrain.model.moe.config import PEER

# Where a width of :class:`BaseWidths` stands in the model section.
SECTIONS = {
    "hidden_size": None,
    "intermediate_size": None,
    "moe_intermediate_size": "moe",
    "shared_intermediate_size": "moe",
    "num_attention_heads": "attention",
    "num_key_value_heads": "attention",
    "head_dim": "attention",
    "q_lora_rank": "attention",
    "kv_lora_rank": "attention",
}
# Of these the base may be left out: mostly they stay as they are when a model becomes wider.
OFTEN_FIXED = ("head_dim", "q_lora_rank", "kv_lora_rank")
# Optimizers whose step does not grow with the gradient, which is what muP's learning rates are made for.
ADAM_LIKE = ("adamw", "adamw_8bit", "lion")

Growing = Literal["heads", "head_dim"]


def widths(model: ModelConfig) -> dict[str, int]:
    """Those of ``SECTIONS`` that the model has, in that order."""
    found: dict[str, int] = {}
    for name, section in SECTIONS.items():
        value = getattr(model if section is None else getattr(model, section), name, None)
        if value is not None:
            found[name] = value
    return found


def with_widths(model: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
    """The same model with other widths."""
    changed: dict[str, object] = {}
    for section in ("moe", "attention"):
        inside = {name: size for name, size in sizes.items() if SECTIONS[name] == section}
        if inside:
            changed[section] = getattr(model, section).model_copy(update=inside)
    changed |= {name: size for name, size in sizes.items() if SECTIONS[name] is None}
    return model.model_copy(update=changed)


def base_model(model: ModelConfig, base: BaseWidths) -> ModelConfig:
    """The model at its base widths."""
    return with_widths(model, base.model_dump(exclude_none=True))


def scaled_widths(
    model: ModelConfig, hidden_size: int, growing: Growing = "heads"
) -> dict[str, int]:
    """The widths of a model of the same proportions.

    Args:
        growing: what attention grows by: more heads of the same size, or larger ones.

    Raises:
        ConfigError: where a width would not be a whole number.
    """
    fixed = ("head_dim",) if growing == "heads" else ("num_attention_heads", "num_key_value_heads")
    found: dict[str, int] = {}
    for name, size in widths(model).items():
        scaled = (
            Fraction(size) if name in fixed else Fraction(size * hidden_size, model.hidden_size)
        )
        if scaled.denominator != 1:
            other = "head_dim" if growing == "heads" else "heads"
            raise ConfigError(
                f"at hidden_size {hidden_size} the model's {name} would be {float(scaled):g}: choose other widths, or let attention grow by {other}"
            )
        found[name] = int(scaled)
    return found


def base_fits_the_model(recipe: Recipe) -> None:
    """Rules about muP's base widths."""
    model, mup = recipe.model, recipe.model.initialization
    if not isinstance(mup, MaximalUpdate):
        return
    sizes, base = widths(model), mup.base.model_dump(exclude_none=True)
    used = dict(sizes)
    if len(model.moe_layers) == model.num_hidden_layers:
        used.pop("intermediate_size", None)
    if missing := [name for name in used if name not in base and name not in OFTEN_FIXED]:
        raise ConfigError(
            f"model.initialization.base.{missing[0]} is missing: give the base model's, "
            f"or {sizes[missing[0]]} as here where it does not grow with the width"
        )
    if unknown := [name for name in base if name not in sizes]:
        raise ConfigError(
            f"model.initialization.base.{unknown[0]} is given, but the model has no {unknown[0]}: leave it out"
        )
    attention = base_model(model, mup.base).attention
    if (
        isinstance(attention, GroupedQueryAttention)
        and attention.num_attention_heads % attention.num_key_value_heads
    ):
        raise ConfigError(
            f"model.initialization.base.num_attention_heads ({attention.num_attention_heads}) is no multiple of its "
            f"num_key_value_heads ({attention.num_key_value_heads}): change one of them"
        )


def mup_knows_the_parts(recipe: Recipe) -> None:
    """Rules about what muP has no learning rates for."""
    model = recipe.model
    if not isinstance(model.initialization, MaximalUpdate):
        return
    if isinstance(model.moe, PEER) and model.moe_layers:
        raise ConfigError(
            "model.initialization.kind=mup does not know model.moe.kind=peer, whose experts are rows of tables with one learning rate: "
            "use model.initialization.kind=standard, or experts of kind dropless or deepspeed"
        )
    if recipe.optimizer.kind not in ADAM_LIKE:
        raise ConfigError(
            f"model.initialization.kind=mup has learning rates for optimizers like Adam, not for optimizer.kind={recipe.optimizer.kind}: "
            f"use {' or '.join(ADAM_LIKE)}, or model.initialization.kind=standard"
        )
    shared = (
        "tie_word_embeddings"
        if model.tie_word_embeddings
        else "embedding_size"
        if model.embedding_size
        else None
    )
    if shared is not None and not model.final_norm:
        raise ConfigError(
            f"model.initialization.kind=mup with model.{shared} scales the logits by the final norm, and there is none: set model.final_norm=true"
        )


def width_ratio(model: ModelConfig) -> float:
    """hidden_size / that of muP's base; 1 with any other initialisation."""
    mup = model.initialization
    return model.hidden_size / mup.base.hidden_size if isinstance(mup, MaximalUpdate) else 1.0


def initial_router_std(model: ModelConfig) -> float:
    """Standard deviation that a router's matrix starts with."""
    return model.initializer_range / width_ratio(model)
