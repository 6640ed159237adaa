"""The types of ``state.json``, checked when it is read: the file may be anybody's.

What the loader and plugins' guards keep in it is their own, and only known to be an object.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain.core.files import JsonObject
from pretrain.core.saved_types import Count, first_fault


class _Saved(BaseModel):
    # strict: "12" and true are no numbers. Keys of a later version are none of this check.
    model_config = ConfigDict(strict=True, extra="allow")


class SavedProgress(_Saved):
    """The types of :class:`pretrain.guards.progress.Progress`, field by field."""

    # A count that is not known here cannot be continued.
    model_config = ConfigDict(strict=True, extra="forbid")

    step: Count = 0
    skipped_steps: Count = 0
    skipped_tokens: Count = 0
    skipped_in_a_row: Count = 0
    train_seconds: float = 0.0
    stall_seconds: float = 0.0
    rolled_back_steps: Count = 0
    rolled_back_seconds: float = 0.0
    last_validation: float | None = None
    validation_step: Count | None = None
    validation_targets: Count | None = None
    best_validation: float | None = None
    best_step: Count | None = None
    rollbacks: Count = 0
    learning_rate_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    patience_loss: float | None = None
    stale_validations: Count = 0
    stopped_early: bool = False
    epoch_steps: dict[str, Count] = {}


class SavedTrend(_Saved):
    """The types of :class:`pretrain.guards.trend.TrendState`."""

    block_steps: Count = 0
    medians: list[float] = []
    first_steps: list[Count] = []
    values: list[float] = []
    first_step: Count = 0


class SavedSustained(_Saved):
    """The types of :class:`pretrain.guards.trend.SustainedState`."""

    values: list[float] = []
    first_step: Count = 0


class SavedGuards(_Saved):
    """The types of :class:`pretrain.guards.detect.GuardState`."""

    losses: list[float] = []
    log_norms: list[float] = []
    trend: SavedTrend = SavedTrend()
    sustained: SavedSustained = SavedSustained()
    more: dict[str, JsonObject] = {}
    in_a_row: dict[str, Count] = {}
    first: dict[str, Count] = {}


class SavedEngine(_Saved):
    """The types of :class:`pretrain.engine.engine.EngineCounts`."""

    steps: Count = 0
    samples: Count = 0
    skipped: Count = 0
    loss_scale: dict[str, float] = {}


class SavedCounts(_Saved):
    """The types of :class:`pretrain.checkpoint.state.ParameterCounts`."""

    total: Count
    active: Count


class SavedSource(_Saved):
    """The types of :class:`pretrain.checkpoint.state.SourceFacts`."""

    kind: str
    documents: Count
    tokens: Count
    share: float


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SavedHardware(_Saved):
    """The types of :class:`pretrain.checkpoint.state.HardwareUse`."""

    device: Annotated[str, Field(max_length=1000)]
    is_cpu: bool
    devices: Count
    cores_per_device: Count
    starts: Count
    wall_seconds: Seconds
    device_seconds: Seconds
    joules: Seconds
    covered_seconds: Seconds
    counters: list[str]


class SavedState(_Saved):
    """The types of :class:`pretrain.checkpoint.state.CheckpointState`."""

    step: Count
    consumed_tokens: Count = 0
    epoch: float | None = None
    validation_loss: float | None = None
    validation_step: Count | None = None
    validation_targets: Count | None = None
    phase: str | None = None
    progress: SavedProgress = SavedProgress()
    data: JsonObject = {}
    guards: SavedGuards = SavedGuards()
    engine: SavedEngine = SavedEngine()
    hardware: SavedHardware | None = None
    saved_at: float = 0.0
    tokenizer_sha256: str | None = None
    world_size: Count = 1
    ep_size: Count = 1
    sp_size: Count = 1
    tp_size: Count = 1
    zero_stage: Count = 0
    parameters: SavedCounts = SavedCounts(total=0, active=0)
    sources: dict[str, SavedSource] = {}


def wrong_type(state: JsonObject) -> str | None:
    """Return which field of a state has a value that it cannot have, in words; None if none."""
    try:
        SavedState.model_validate(state)
    except ValidationError as error:
        return f"has {first_fault(error)}"
    return None
