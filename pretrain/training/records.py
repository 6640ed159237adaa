"""Records of metrics: typed here, JSON lines in ``metrics.jsonl``.

The order of the keys in ``to_dict`` is that of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median_low
from typing import Any, Protocol

from data_pipeline.loading.interface import Loader
from pretrain.callbacks.base import CallbackList
from pretrain.checkpoint.model_card import perplexity_of
from pretrain.config.timeline import Timeline
from pretrain.core.files import JsonObject
from pretrain.engine.step import MeanLosses
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import RouterTotals
from pretrain.model.moe.losses import ALWAYS_COMPUTED, LOSSES, loss_weights


@dataclass(frozen=True)
class Position:
    """Where in the run and in the data a record is.

    Attributes:
        step: the last one that it is about, from 1.
        tokens: of all steps so far.
        epoch: passes over the training split; None if that is not known.
        phase: its name; "" for a run without phases.
        phase_number: from 1.
    """

    step: int
    tokens: int
    epoch: float | None
    phase: str
    phase_number: int

    def to_dict(self, kind: str) -> JsonObject:
        """Return what a record of a kind begins with."""
        head: JsonObject = {"kind": kind, "step": self.step, "tokens": self.tokens}
        # Keys without a value are left out, so that a chart has no gap of nulls.
        if self.epoch is not None:
            head["epoch"] = self.epoch
        if self.phase:
            head |= {"phase": self.phase, "phase_number": self.phase_number}
        return head


class Record(Protocol):
    """One line of metrics."""

    def to_dict(self) -> JsonObject:
        """Return it as ``metrics.jsonl`` has it."""


@dataclass(frozen=True)
class LayerRecord:
    """What the router of one layer did.

    Attributes:
        layer: its number in the model, from 0.
        expert_load: share of choices that each expert got; 1/E each if balanced.
        losses: router losses by name, without their weights.
        entropy: of the router's distribution over experts, nats.
        dropped_share: of choices that were over an expert's capacity.
    """

    layer: int
    expert_load: list[float]
    losses: dict[str, float]
    entropy: float
    dropped_share: float

    def to_dict(self) -> JsonObject:
        """Return it as an entry of ``layers``."""
        return {
            "layer": self.layer,
            "expert_load": self.expert_load,
            **self.losses,
            "entropy": self.entropy,
            "dropped_share": self.dropped_share,
        }


@dataclass(frozen=True)
class RouterRecord:
    """What the routers did: means over layers, and the layers themselves.

    Attributes:
        max_violation: MaxVio (Wang et al. 2024): how far the busiest expert is above the mean load.
    """

    losses: dict[str, float]
    entropy: float
    max_violation: float
    dropped_share: float
    layers: list[LayerRecord]

    @classmethod
    def of(cls, totals: RouterTotals | None, model: ModelConfig) -> RouterRecord | None:
        """Make it from sums over all ranks; None for a model without routers."""
        if totals is None or model.routing is None:
            return None
        # Each layer's counts sum to tokens x top_k: shares of choices, 1/E if balanced.
        shares_LE = totals.counts_LE / totals.counts_LE.sum(dim=1, keepdim=True)
        weights = loss_weights(model.routing)
        # A loss without a weight is not computed, unless it is cheap and worth watching.
        losses = {
            name: values_L
            for name, values_L in zip(LOSSES, totals.losses_LJ.unbind(1), strict=True)
            if weights[name] or name in ALWAYS_COMPUTED
        }
        # One transfer from the device for each column, not one for each layer.
        per_layer = {name: values_L.tolist() for name, values_L in losses.items()}
        loads = shares_LE.tolist()
        entropies = totals.entropy_L.tolist()
        dropped = totals.dropped_L.tolist()
        # Busiest expert / mean - 1: 0 if balanced, E - 1 if one expert gets everything.
        violations_L = shares_LE.max(dim=1).values * shares_LE.shape[1] - 1
        return cls(
            losses={name: values_L.mean().item() for name, values_L in losses.items()},
            entropy=totals.entropy_L.mean().item(),
            max_violation=violations_L.mean().item(),
            dropped_share=totals.dropped_L.mean().item(),
            layers=[
                LayerRecord(
                    layer=layer,
                    expert_load=loads[place],
                    losses={name: values[place] for name, values in per_layer.items()},
                    entropy=entropies[place],
                    dropped_share=dropped[place],
                )
                for place, layer in enumerate(model.routed_layers)
            ],
        )

    def to_dict(self) -> JsonObject:
        """Return it as part of a training record."""
        return {
            **self.losses,
            "router_entropy": self.entropy,
            "max_violation": self.max_violation,
            "dropped_share": self.dropped_share,
            "layers": [layer.to_dict() for layer in self.layers],
        }


@dataclass(frozen=True)
class TrainRecord:
    """Steps since the last record.

    Attributes:
        steps: that were applied, of which ``losses`` are the means.
        learning_rate: of matrices in the last step.
        learning_rate_factor: of the run's rollbacks, which is in ``learning_rate``.
        grad_norm: of the last step, before clipping.
        skipped_steps: of the whole run.
        seconds: of the whole run, in steps.
        stall_seconds: of the whole run, in which training waited for batches.
        mfu: model FLOP/s used, as a share of the devices' peak; None if that is not known.
    """

    position: Position
    steps: int
    losses: MeanLosses
    learning_rate: float
    learning_rate_factor: float
    grad_norm: float
    tokens_per_second: float
    skipped_steps: int
    loss_scale: float
    seconds: float
    stall_seconds: float
    mfu: float | None
    router: RouterRecord | None

    def to_dict(self) -> JsonObject:
        """Return it as ``metrics.jsonl`` has it."""
        record = self.position.to_dict("train") | {
            "steps": self.steps,
            "loss": self.losses.cross_entropy,
            "total_loss": self.losses.total,
        }
        # Of the mean loss, as papers state it; no key instead of an infinity, which JSON lacks.
        if (perplexity := perplexity_of(self.losses.cross_entropy)) is not None:
            record["perplexity"] = perplexity
        if self.losses.multi_token is not None:
            record["multi_token_loss"] = self.losses.multi_token
        record["learning_rate"] = self.learning_rate
        if self.learning_rate_factor != 1.0:
            record["learning_rate_factor"] = self.learning_rate_factor
        record |= {
            "grad_norm": self.grad_norm,
            "tokens_per_second": self.tokens_per_second,
            "skipped_steps": self.skipped_steps,
            "loss_scale": self.loss_scale,
            "seconds": self.seconds,
            "stall_seconds": self.stall_seconds,
        }
        if self.mfu is not None:
            record["mfu"] = self.mfu
        return record if self.router is None else record | self.router.to_dict()


@dataclass(frozen=True)
class UsageRecord:
    """A window of expert usage.

    Attributes:
        columns: of :func:`pretrain.analysis.expert_usage.usage_columns`.
    """

    position: Position
    steps: int
    columns: Mapping[str, Any]

    def to_dict(self) -> JsonObject:
        """Return it as ``metrics.jsonl`` has it."""
        return self.position.to_dict("usage") | {"steps": self.steps} | dict(self.columns)


@dataclass(frozen=True)
class ValidationRecord:
    """Loss over held-out data: nats a target, and the number of targets."""

    position: Position
    validation_loss: float
    targets: int

    def to_dict(self) -> JsonObject:
        """Return it as ``metrics.jsonl`` has it."""
        record = self.position.to_dict("validation") | {
            "validation_loss": self.validation_loss,
            "targets": self.targets,
        }
        if (perplexity := perplexity_of(self.validation_loss)) is not None:
            record["validation_perplexity"] = perplexity
        return record


@dataclass(frozen=True)
class TimingRecord:
    """Where the run's time went, and how long each rank works on a step.

    Attributes:
        goodput: of :meth:`pretrain.training.goodput.Account.goodput`.
        rank_seconds: each rank's own work in a step, without waiting for others; empty if it was
            not measured.
        slow_ranks: those that take much longer than the median, with their multiple of it.
    """

    position: Position
    goodput: JsonObject
    rank_seconds: list[float]
    slow_ranks: dict[int, float]

    def to_dict(self) -> JsonObject:
        """Return it as ``metrics.jsonl`` has it."""
        record = self.position.to_dict("timing") | self.goodput
        if not self.rank_seconds:
            return record
        return record | {
            "rank_seconds": self.rank_seconds,
            "slowest_over_median": max(self.rank_seconds) / median_low(self.rank_seconds),
            # Keys of JSON are strings.
            "slow_ranks": {str(rank): factor for rank, factor in self.slow_ranks.items()},
        }


class RecordWriter:
    """Passes records to the callbacks, which write them."""

    def __init__(self, timeline: Timeline, loader: Loader, callbacks: CallbackList) -> None:
        self.timeline = timeline
        self.loader = loader
        self.callbacks = callbacks

    def position(self, step: int) -> Position:
        """Return where a record after ``step`` steps is."""
        # The step that was just taken has the index step - 1.
        phase = self.timeline.at(step - 1)
        tokens = self.timeline.tokens_after(step)
        return Position(step, tokens, self.loader.epochs(step), phase.name, phase.number)

    def write(self, record: Record) -> None:
        """Pass one record to the callbacks."""
        self.callbacks.on_record(record.to_dict())
