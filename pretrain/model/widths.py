"""The widths of a model: what grows as it becomes wider, and the base that muP compares with."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

from pretrain.core.errors import ConfigError
from pretrain.model.config import ModelConfig
from pretrain.model.init_config import BaseWidths

# Each width of :class:`BaseWidths` -> the section inside ``model`` that has it; None: model itself.
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
# Their base may be left out: most recipes keep them when a model becomes wider.
OFTEN_FIXED = ("head_dim", "q_lora_rank", "kv_lora_rank")

Growing = Literal["heads", "head_dim"]


def widths(model: ModelConfig) -> dict[str, int]:
    """The widths of ``SECTIONS`` that the model has, in that order."""
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
        growing: whether attention gets more heads of the same size, or larger heads.

    Raises:
        ConfigError: if a width would not be a whole number.
    """
    fixed = ("head_dim",) if growing == "heads" else ("num_attention_heads", "num_key_value_heads")
    # Fractions, because a float would round 2/3 of 96 before it can be checked.
    found: dict[str, int] = {}
    for name, size in widths(model).items():
        scaled = (
            Fraction(size) if name in fixed else Fraction(size * hidden_size, model.hidden_size)
        )
        if scaled.denominator != 1:
            other = "head_dim" if growing == "heads" else "heads"
            raise ConfigError(
                f"at hidden_size {hidden_size} the model's {name} would be {float(scaled):g}: "
                f"choose other widths, or let attention grow by {other}"
            )
        found[name] = int(scaled)
    return found


def width_ratio(model: ModelConfig) -> float:
    """hidden_size / that of muP's base; 1 with any other initialisation."""
    # 1 without muP: nothing is scaled then.
    base = model.initialization.base_widths
    return 1.0 if base is None else model.hidden_size / base.hidden_size


def initial_router_std(model: ModelConfig) -> float:
    """Standard deviation that a router's matrix starts with."""
    return model.initializer_range / width_ratio(model)
