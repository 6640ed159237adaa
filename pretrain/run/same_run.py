"""Whether a checkpoint may be resumed: the same model, tokenizer and order of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pretrain.checkpoint.state import CheckpointState, Fingerprint
from pretrain.config.differences import dotted_fields
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Phase, Timeline, length_field
from pretrain.core.errors import ConfigError
from pretrain.run.folder import OTHER_FOLDER

# What makes a run this run: a change of any of these would continue another model, or with another
# order of data.
FIXED_FIELDS = (
    "seed",
    "model",
    "data.document_mask",
    "data.packing",
    "data.order.kind",
    "data.streaming",
    "train.sequence_length",
    "train.global_batch_size",
    "optimizer.kind",
)
# What phases change of a recipe ...
CHANGED_BY_PHASES = (
    "model",
    "train.sequence_length",
    "train.global_batch_size",
    "data.mixture",
)
# ... and what they add to it.
PHASE_FIELDS = ("schedule", "frozen")
# Where a run is and how it began say nothing of how it continues.
HOW_EXPERTS_COMPUTE = ("expert_kernel", "exchange", "deduplicate")
NO_CHANGES = ("name", "run_path", "branch_from", "initial_weights", "initial_weights_partial")
WAYS_OUT = f"{OTHER_FOLDER}, or start over with --fresh --overwrite"


def check_same_run(
    now: Recipe,
    saved: Recipe,
    fingerprint: Fingerprint,
    state: CheckpointState,
    folder: Path,
) -> None:
    """Refuse to resume a checkpoint of another model, tokenizer or order.

    Args:
        now: the recipe of the run that starts.
        saved: the recipe of the checkpoint.
        fingerprint: with the tokenizer, which ``state`` (of the checkpoint) must have too.
        folder: of the run, for sentences.

    Raises:
        ConfigError: naming what differs and what to do.
    """
    if difference := past_difference(now, saved, state["step"]):
        raise ConfigError(
            f"{folder} holds a run with another {difference}: put it back, {WAYS_OUT}"
        )
    if difference := fingerprint_difference(fingerprint, state):
        raise ConfigError(
            f"{folder} holds a run with {difference}: "
            f"resume with what it was started with, {WAYS_OUT}"
        )


def check_branch(
    now: Recipe,
    parent: Recipe,
    fingerprint: Fingerprint | None,
    state: CheckpointState,
    checkpoint: Path,
) -> None:
    """Refuse a checkpoint of another run (``branch_from``) whose past is not the recipe's.

    Args:
        now: the recipe of the run that starts.
        parent: the recipe of the other run.
        fingerprint: with the tokenizer, which ``state`` (of the checkpoint) must have too; None if
            it is not known yet.
        checkpoint: for sentences.

    Raises:
        ConfigError: naming what differs and what to do.
    """
    step = state["step"]
    if difference := past_difference(now, parent, step):
        raise ConfigError(
            f"branch_from: {checkpoint} is of a run with another {difference}: "
            "make the recipe the parent run's up to that step"
        )
    if fingerprint and (difference := fingerprint_difference(fingerprint, state)):
        raise ConfigError(
            f"branch_from: {checkpoint} is of a run with {difference}: "
            "start the branch as its parent run was"
        )
    num_steps = Timeline(now).num_steps
    if step >= num_steps:
        raise ConfigError(
            f"branch_from: {checkpoint} is at step {step}, and the recipe ends after {num_steps}: "
            f"raise {length_field(now)}"
        )


def fingerprint_difference(now: Fingerprint, saved: CheckpointState) -> str | None:
    """Return what the tokenizers differ in, in words; None if nothing does."""
    if saved.get("tokenizer_sha256") != now["tokenizer_sha256"]:
        return "another tokenizer"
    return None


def changes(now: Recipe, saved: Recipe, fingerprint: Fingerprint, state: CheckpointState) -> str:
    """Return what a resume does otherwise than the checkpoint's run, in words; empty if nothing.

    The state of a checkpoint is that of the whole model, so any topology can continue it.
    """
    pairs: dict[str, tuple[object, object]] = {
        "world size": (state.get("world_size"), fingerprint["world_size"]),
        "ZeRO stage": (state.get("zero_stage"), fingerprint["zero_stage"]),
    }
    before, after = (dotted_fields(recipe.model_dump(mode="json")) for recipe in (saved, now))
    pairs |= {
        field: (before.get(field), after.get(field))
        for field in (before | after)
        if field not in NO_CHANGES
    }
    return ", ".join(f"{what} {old} -> {new}" for what, (old, new) in pairs.items() if old != new)


def past_difference(now: Recipe, saved: Recipe, step: int) -> str | None:
    """Return the first field in which two recipes differ about the first ``step`` steps, in words.

    Without phases the mixture may change: the new one holds from here on. The sections of phases
    say what it was, also after they are over. None if nothing differs.
    """
    timelines = Timeline(now), Timeline(saved)
    phases = [phase for timeline in timelines for phase in timeline.phases]
    # Between two starts of phases, of either recipe, nothing changes.
    starts = {0, *(phase.first_step for phase in phases if phase.first_step < step)}
    fields = (*FIXED_FIELDS, "data.mixture") if now.phases or saved.phases else FIXED_FIELDS
    for start in sorted(starts):
        here, before = (timeline.at(start) for timeline in timelines)
        pairs = {
            field: (_field(before.recipe, field), _field(here.recipe, field)) for field in fields
        }
        pairs |= {
            field: (_phase_field(before, field), _phase_field(here, field))
            for field in PHASE_FIELDS
        }
        for field, (old, new) in pairs.items():
            if old != new:
                phase = here.name if field in (*CHANGED_BY_PHASES, *PHASE_FIELDS) else ""
                where = f"{field} in the phase '{phase}'" if phase else field
                return f"{where} ({_difference(old, new)})"
    return None


def _field(recipe: Recipe, dotted: str) -> Any:
    """Return the value at a dotted path, as JSON."""
    value: Any = recipe.model_dump(mode="json")
    # How it is computed, not what: it may follow from the device and the number of ranks.
    del value["model"]["attention"]["kernel"]
    for name in HOW_EXPERTS_COMPUTE:
        (value["model"]["moe"] or {}).pop(name, None)
    for key in dotted.split("."):
        value = value[key]
    return value


def _phase_field(phase: Phase, field: str) -> Any:
    """Return a phase's value of one of ``PHASE_FIELDS``, as JSON."""
    value = getattr(phase, field)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else list(value or ())


def _difference(before: Any, after: Any, path: str = "") -> str:
    """Return the first difference of two nested values, as 'path: before -> after'.

    A section's values come before those of the sections in it, whose defaults may follow from them.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        keys = before.keys() | after.keys()
        for key in sorted(keys, key=lambda key: (isinstance(before.get(key), dict), key)):
            if before.get(key) != after.get(key):
                inner = f"{path}.{key}" if path else key
                return _difference(before.get(key), after.get(key), inner)
    return f"{path + ': ' if path else ''}{before} -> {after}"
