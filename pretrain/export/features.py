"""What an architecture takes of a recipe's model: a white list of fields, so that a feature nobody thought of speaks against it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from pretrain.config.model_schema import ModelConfig
from pretrain.config.section import Section

ANY = None
"""In a white list: whatever the field says."""

# Fields that change nothing of what a finished model computes.
TRAINING_ONLY = frozenset(
    {
        "dropout.embedding",
        "dropout.attention",
        "dropout.residual",
        "dropout.feed_forward",
        "dropout.expert",
        "multi_token_prediction",
        "initializer_range",
        "output_z_loss_weight",
        "loss_chunk_tokens",
        "attention.kernel",
        "attention.decode",
        "moe.expert_kernel",
        "moe.aux_loss_weight",
        "moe.z_loss_weight",
        "moe.sequence_loss_weight",
        "moe.cv_loss_weight",
        "moe.entropy_loss_weight",
        "moe.balance_scope",
        "moe.router.jitter",
        "moe.noisy_gate_policy",
        # Room in an expert matters where tokens are dropped, which every architecture refuses.
        "moe.capacity_factor",
        "moe.eval_capacity_factor",
        "moe.min_capacity",
        "moe.use_rts",
        "moe.causal",
        "moe.gate",
    }
)

Takes = Mapping[str, Collection[Any] | None]


def reasons_against(model: ModelConfig, takes: Takes, name: str) -> list[str]:
    """A clause for each field of ``model`` that the architecture ``name`` cannot follow; empty where there is none.

    A field that ``takes`` does not name must be at its default, and one that it names must be among its values. The sections of mixtures of
    experts do not count where no layer is one.
    """
    reasons = []
    for path, value, field in _fields(model, ""):
        if path in TRAINING_ONLY or path.startswith("initialization.") or (path.startswith("moe.") and not model.moe_layers):
            continue
        if path in takes:
            allowed = takes[path]
            if allowed is not None and value not in allowed:
                only = " or ".join(_shown(one) for one in allowed)
                reasons.append(f"model.{path} is {_shown(value)}, and {name} has only {only}")
        elif field.is_required() or value != field.get_default():
            reasons.append(f"model.{path} is {_shown(value)}, and {name} has nothing for it")
    return reasons


def _fields(section: Section, prefix: str) -> Iterator[tuple[str, Any, FieldInfo]]:
    """Path, value and declaration of each field; a section stands for its own fields, but one that is there or not counts as one value."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        optional = field.get_default() is None and not field.is_required() and prefix + name != "moe"
        if isinstance(value, Section) and not optional:
            yield from _fields(value, f"{prefix}{name}.")
        elif name != "moe":
            yield f"{prefix}{name}", value, field


def _shown(value: Any) -> str:
    if isinstance(value, Section):
        return "set"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
