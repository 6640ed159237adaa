"""What a checkpoint says of its run: ``state.json``, and each rank's file.

The classes are the files' shape and decode to plain dictionaries. A file of an earlier version, or
one of weights without a run, lacks keys: so none but ``step`` may be taken for granted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NotRequired, TypedDict

from pretrain.core.files import JsonObject

if TYPE_CHECKING:
    # Reading a checkpoint imports no engine.
    from pretrain.engine.engine import EngineCounts
    from pretrain.engine.pending import SavedStep


class Fingerprint(TypedDict):
    """What must be the same for a checkpoint to be resumed; the loader compares the data itself."""

    tokenizer_sha256: str
    world_size: int
    ep_size: int
    sp_size: int
    tp_size: int
    zero_stage: int


class ParameterCounts(TypedDict):
    """Parameters of the model, and those that one token uses."""

    total: int
    active: int


class SourceFacts(TypedDict):
    """A source of the training split; ``share`` is of its tokens."""

    kind: str
    documents: int
    tokens: int
    share: float


class CardFacts(TypedDict):
    """What a model card says in addition to recipe and progress."""

    parameters: ParameterCounts
    sources: dict[str, SourceFacts]


class HardwareUse(TypedDict):
    """What all starts of a run have used up to a checkpoint.

    Attributes:
        device, is_cpu, devices, cores_per_device: of the newest start, a device for each rank;
            cores are threads that compute.
        starts: of the run.
        wall_seconds: of all starts, from the creation of their processes.
        device_seconds: wall seconds times ranks.
        joules: that counters of energy have seen, on all ranks.
        covered_seconds: device seconds during which they counted.
        counters: their names.
    """

    device: str
    is_cpu: bool
    devices: int
    cores_per_device: int
    starts: int
    wall_seconds: float
    device_seconds: float
    joules: float
    covered_seconds: float
    counters: list[str]


class CheckpointState(TypedDict):
    """The content of ``state.json``.

    Attributes:
        step: optimizer steps that are done.
        consumed_tokens: of these steps.
        epoch: passes over the training split; None if that is not known.
        validation_loss: the newest one, nats a token, which was measured after
            ``validation_step`` over ``validation_targets`` tokens.
        phase: the name of the last step's phase; None in a run without phases.
        progress: :class:`pretrain.guards.progress.Progress`.
        data: where the loader is; empty for weights without a run.
        guards: what the guards remember.
        engine: what the engine counts; none for weights without a run.
        hardware: what the run has used; None before it was counted.
        saved_at: seconds since 1970 (UTC).
    """

    step: int
    consumed_tokens: NotRequired[int]
    epoch: NotRequired[float | None]
    validation_loss: NotRequired[float | None]
    validation_step: NotRequired[int | None]
    validation_targets: NotRequired[int | None]
    phase: NotRequired[str | None]
    progress: NotRequired[JsonObject]
    data: NotRequired[JsonObject]
    guards: NotRequired[JsonObject]
    engine: NotRequired[EngineCounts]
    hardware: NotRequired[HardwareUse | None]
    saved_at: NotRequired[float]
    # Of the fingerprint; a TypedDict cannot inherit keys as optional ones.
    tokenizer_sha256: NotRequired[str | None]
    world_size: NotRequired[int]
    ep_size: NotRequired[int]
    sp_size: NotRequired[int]
    tp_size: NotRequired[int]
    zero_stage: NotRequired[int]
    # Of the card's facts.
    parameters: NotRequired[ParameterCounts]
    sources: NotRequired[dict[str, SourceFacts]]


class RankState(TypedDict, total=False):
    """What one rank saves for itself, in addition to its random state.

    Attributes:
        pending: steps that are in no metrics record yet.
        row_seconds: the training time of these steps.
    """

    pending: list[SavedStep]
    # The name in the files; a record was once called a row.
    row_seconds: float
