"""Reports what went wrong in a run: ``incidents.jsonl``, the log, and a line on the terminal."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data_pipeline.loading.batch import Origin
from data_pipeline.loading.interface import Loader
from pretrain.config.guards import Action
from pretrain.core.files import JsonObject
from pretrain.engine.step import StepResult
from pretrain.engine.topology import Topology
from pretrain.guards.detect import Violation
from pretrain.guards.locate import NonFinite

logger = logging.getLogger(__name__)

INCIDENTS = "incidents.jsonl"
# Of a step with more micro batches only the worst ones are reported.
MAX_MICRO_BATCHES = 8
CONSEQUENCES: dict[Action, str] = {
    "warn": "training continues",
    "skip": "the step is skipped",
    "rollback": "the run goes back",
    "stop": "the run stops",
}


@dataclass(frozen=True)
class Incident:
    """One line of ``incidents.jsonl``.

    Attributes:
        guard: its field in ``guards`` of the recipe.
        step: from 1; None if it is not of one step.
        details: further keys, which depend on the guard.
    """

    guard: str
    action: Action
    step: int | None
    reason: str
    details: JsonObject

    def to_dict(self) -> JsonObject:
        """Return it as the file has it, with the time of now."""
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "guard": self.guard,
            "action": self.action,
            "step": self.step,
            "reason": self.reason,
            **self.details,
        }


@dataclass(frozen=True)
class SuspectMicroBatch:
    """One micro batch of a step that went wrong.

    Attributes:
        micro_batch: of its rank in the step, from 0.
        loss: what was minimised; None if it is not finite or not known.
        not_finite: ``loss``, or the weight whose gradient is not finite; "" if nobody looked for
            it.
        sequences: source and documents of each sequence; empty if they are no longer known.
    """

    rank: int
    micro_batch: int
    loss: float | None = None
    not_finite: str = ""
    sequences: tuple[str, ...] = ()

    def to_dict(self) -> JsonObject:
        """Return it as ``incidents.jsonl`` has it."""
        what: JsonObject = (
            {"not_finite": self.not_finite} if self.not_finite else {"loss": self.loss}
        )
        place = {"rank": self.rank, "micro_batch": self.micro_batch}
        return place | what | {"sequences": list(self.sequences)}

    def __str__(self) -> str:
        loss = math.nan if self.loss is None else self.loss
        what = self.not_finite or f"loss {loss:.4f}"
        documents = self.sequences[0] if self.sequences else "documents no longer known"
        return f"rank {self.rank}, micro batch {self.micro_batch}, {what}: {documents}"


class IncidentLog:
    """Reports incidents.

    Rank 0 reports those of a step, and any rank that it waits for data.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path, loader: Loader, topology: Topology) -> None:
        self.path = folder / INCIDENTS
        self.loader = loader
        self.topology = topology

    def report_step(
        self, violation: Violation, result: StepResult, found: list[NonFinite] | None = None
    ) -> None:
        """Report an incident of a training step, with its worst micro batches and their documents.

        Every rank must call it.

        Args:
            result: of that step, on this rank.
            found: what is not finite, if that was searched for.
        """
        # Collective: every rank has the losses of its micro batches only.
        losses = self.topology.all_gather([finite(float(loss)) for loss in result.micro_losses])
        origins = self._all_origins(violation.step - 1)
        if not self.topology.is_main:
            return
        suspects = _worst(losses) if found is None else _not_finite(found)
        suspects = self._with_documents(suspects, origins, len(result.micro_losses))
        details = {
            "in_a_row": violation.in_a_row,
            "grad_norm": finite(result.grad_norm),
            "micro_batches": [suspect.to_dict() for suspect in suspects],
        }
        self._write(_incident(violation, details))
        where = ""
        if found == []:
            where = "; it did not happen again when the step was repeated: suspect the hardware"
        elif suspects:
            others = f" and {len(suspects) - 1} more" if found and len(suspects) > 1 else ""
            where = f"; {suspects[0]}{others}"
        self._warn(violation, where)

    def report(self, violation: Violation, **details: float | None) -> None:
        """Report an incident that is not of one batch; rank 0 does."""
        if self.topology.is_main:
            self._write(_incident(violation, details))
            self._warn(violation, "")

    def report_rollback(self, step: int, learning_rate_factor: float | None) -> None:
        """Report the step that the run went back to; rank 0 does.

        Args:
            learning_rate_factor: of all rollbacks so far; None if they do not change the rate.
        """
        if not self.topology.is_main:
            return
        text = f"went back to the checkpoint of step {step}"
        if learning_rate_factor is None:
            logger.warning("%s", text)
            return
        text += f"; the learning rate is {learning_rate_factor:.4g} of its schedule from here on"
        logger.warning("%s", text)
        tqdm.write(f"warning: {text}", file=sys.stderr)

    def report_stall(self, seconds: float, reading: str) -> None:
        """Report that this rank waits for a batch; it is called again when the wait has doubled."""
        rank = self.topology.rank
        reason = f"rank {rank} has waited {seconds:.0f} seconds for a batch while {reading} is read"
        details = {"rank": rank, "seconds": seconds, "reading": reading}
        self._write(Incident("stalled_data", "warn", None, reason, details))
        logger.warning("%s", reason)
        tqdm.write(f"warning: {reason}; training waits", file=sys.stderr)

    def _all_origins(self, step: int) -> list[Origin]:
        """Origins of a step (from 0) over all ranks, each from a rank that knows its documents."""
        known = self.topology.all_gather(self.loader.origins(step))
        return [
            next((origin for origin in origins if origin.documents), origins[0])
            for origins in zip(*known, strict=True)
        ]

    def _with_documents(
        self,
        suspects: Sequence[SuspectMicroBatch],
        origins: Sequence[Origin],
        accumulation_steps: int,
    ) -> list[SuspectMicroBatch]:
        """Look up the documents of micro batches of a step."""
        ranks = self.loader.dp_size
        size = len(origins) // (ranks * accumulation_steps)
        found = []
        for suspect in suspects:
            # Number k of data-parallel rank r is micro batch r + k * ranks of the step.
            dp_rank = suspect.rank // self.topology.token_parts
            first = (dp_rank + suspect.micro_batch * ranks) * size
            sequences = tuple(describe(origin) for origin in origins[first : first + size])
            found.append(replace(suspect, sequences=sequences))
        return found

    def _write(self, incident: Incident) -> None:
        line = json.dumps(incident.to_dict())
        logger.warning("incident: %s", line)
        # One write of a whole line: several ranks may append to the file.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _warn(self, violation: Violation, where: str) -> None:
        """Print a line on the terminal, unless it would repeat the one of the step before."""
        # A loss that stays high would print a line for every step; the file has all of them.
        if violation.in_a_row > 1 and violation.action == "warn":
            return
        tqdm.write(
            f"warning: step {violation.step}: {violation.reason}{where}; "
            f"{CONSEQUENCES[violation.action]} ({self.path})",
            file=sys.stderr,
        )


def _incident(violation: Violation, details: JsonObject) -> Incident:
    return Incident(violation.guard, violation.action, violation.step, violation.reason, details)


def _worst(losses: list[list[float | None]]) -> list[SuspectMicroBatch]:
    """Return the micro batches of the highest losses.

    One that is not finite comes first.

    Args:
        losses: of each rank's micro batches.
    """
    everything = [
        SuspectMicroBatch(rank, number, loss=loss)
        for rank, rank_losses in enumerate(losses)
        for number, loss in enumerate(rank_losses)
    ]
    everything.sort(key=lambda entry: -math.inf if entry.loss is None else -entry.loss)
    return everything[:MAX_MICRO_BATCHES]


def _not_finite(found: list[NonFinite]) -> list[SuspectMicroBatch]:
    return [
        SuspectMicroBatch(entry.rank, entry.micro_batch, not_finite=entry.where)
        for entry in found[:MAX_MICRO_BATCHES]
    ]


def describe(origin: Origin) -> str:
    """Return a sequence's source and documents in one line."""
    parts = []
    for place, first, last in origin.documents:
        which = f"document {first}" if first == last else f"documents {first} to {last}"
        parts.append(f"{which} in {place}")
    return f"{origin.source}: {', '.join(parts)}"


def finite(value: float) -> float | None:
    """Return a value, or None if it is not finite: JSON has no NaN."""
    # ZeRO reports a norm that is not finite as -1.
    return value if math.isfinite(value) and value >= 0 else None
