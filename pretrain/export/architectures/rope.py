"""Converts between transformers' ``rope_parameters`` and a recipe's position section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject
from pretrain.export.features import ANY, Takes
from pretrain.model.positions.config import RotaryBase

# The fields of each kind that both call by the same name.
YARN_FIELDS = (
    *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
)
LLAMA3_FIELDS = (
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
)
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "default": ("rope", ()),
    "yarn": ("yarn", YARN_FIELDS),
    "llama3": ("llama3", LLAMA3_FIELDS),
}

ROPE: Takes = {
    "position.kind": ("rope", "yarn", "llama3"),
    "position.rope_theta": ANY,
    **{f"position.{field}": ANY for field in (*YARN_FIELDS, *LLAMA3_FIELDS)},
    # Outside of DeepSeek's own architectures transformers does not scale attention by it.
    "position.mscale": (None,),
    "position.mscale_all_dim": (None,),
}


def rope_parameters(position: RotaryBase) -> JsonObject:
    """transformers' ``rope_parameters`` of a position section; a field that is None is left out."""
    kind, names = next(
        (theirs, names) for theirs, (ours, names) in KINDS.items() if ours == position.kind
    )
    fields = {field: getattr(position, field) for field in names}
    set_fields = {field: value for field, value in fields.items() if value is not None}
    return {"rope_type": kind, "rope_theta": position.rope_theta, **set_fields}


def position_section(config: Mapping[str, Any]) -> JsonObject:
    """A recipe's position section, from a config that transformers has read.

    Raises:
        ConfigError: for a type of scaling that recipes do not have.
    """
    rope = resolved(config.get("rope_parameters"), config["max_position_embeddings"])
    kind = rope["rope_type"]
    if kind not in KINDS:
        raise ConfigError(
            f"config.json's rope_parameters.rope_type is '{kind}', and recipes have"
            f" {', '.join(KINDS)} only: this model cannot be converted"
        )
    if rope.get("rope_theta") is None:
        raise ConfigError(
            "config.json's rope_parameters has no single rope_theta for all layers, and recipes"
            " have only that: this model cannot be converted"
        )
    name, fields = KINDS[kind]
    known = {"rope_type", "rope_theta", "partial_rotary_factor", *fields}
    if unknown := sorted(field for field in rope.keys() - known if rope[field] is not None):
        raise ConfigError(
            f"config.json's rope_parameters has {', '.join(unknown)}, which rope_type '{kind}' has"
            " no meaning for: correct rope_type, or take it out"
        )
    set_fields = {field: rope[field] for field in fields if rope.get(field) is not None}
    return {"kind": name, "rope_theta": rope["rope_theta"], **set_fields}


def resolved(rope: Mapping[str, Any] | None, max_positions: int) -> JsonObject:
    """The parameters that transformers computes with, whichever form they were written in.

    The defaults are those of ``_compute_yarn_parameters`` in transformers' ``modeling_rope_utils``,
    which takes 0 and null for a missing value too, but a null ``truncate`` for false. ``type`` is
    the older name of ``rope_type``.
    """
    fields = {name: value for name, value in (rope or {}).items() if name != "type"}
    kind = fields["rope_type"] = fields.get("rope_type") or "default"
    fields["partial_rotary_factor"] = fields.get("partial_rotary_factor", 1.0)
    if kind != "yarn":
        return fields
    if fields.get("factor") is None and fields.get("original_max_position_embeddings"):
        fields["factor"] = max_positions / fields["original_max_position_embeddings"]
    # "or": transformers takes 0 for a missing value here.
    fields["beta_fast"] = fields.get("beta_fast") or 32.0
    fields["beta_slow"] = fields.get("beta_slow") or 1.0
    # Not "or": here a null means false, and only a missing value means true.
    fields["truncate"] = bool(fields.get("truncate", True))
    if not fields.get("mscale_all_dim"):
        fields["mscale"] = fields["mscale_all_dim"] = None
    return {name: value for name, value in fields.items() if value is not None}
