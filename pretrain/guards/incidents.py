"""What went wrong in a run, for people and programs: ``incidents.jsonl``, the log, and a line on the terminal."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.loading.batch import Origin
from data_pipeline.loading.interface import Loader
from pretrain.engine.engine import StepResult
from pretrain.engine.topology import Topology
from pretrain.guards.detect import Violation
from pretrain.guards.locate import NonFinite

logger = logging.getLogger(__name__)

INCIDENTS = "incidents.jsonl"
# Of a step with many micro batches only so many are told, the worst ones.
MAX_MICRO_BATCHES = 8
DONE = {
    "warn": "it goes on",
    "skip": "the step is skipped",
    "rollback": "the run goes back",
    "stop": "the run stops",
}


class IncidentLog:
    """Tells incidents. Those of a step are told by rank 0, a stalled reader by the rank that waits.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path, loader: Loader, topology: Topology) -> None:
        self.path, self.loader, self.topology = folder / INCIDENTS, loader, topology

    def tell_step(
        self, violation: Violation, result: StepResult, found: list[NonFinite] | None = None
    ) -> None:
        """An incident of a training step, with its worst micro batches and their documents. Every rank must call it.

        Args:
            result: of that step, on this rank.
            found: what is not finite, where that was looked for.
        """
        losses = self.topology.all_gather([finite(float(loss)) for loss in result.micro_losses])
        if not self.topology.is_main:
            return
        worst: list[dict[str, Any]]
        if found is not None:
            worst = [
                {"rank": entry.rank, "micro_batch": entry.micro_batch, "not_finite": entry.where}
                for entry in found[:MAX_MICRO_BATCHES]
            ]
        else:
            worst = [
                {"rank": rank, "micro_batch": number, "loss": loss}
                for rank, own in enumerate(losses)
                for number, loss in enumerate(own)
            ]
            worst = sorted(
                worst, key=lambda entry: -math.inf if entry["loss"] is None else -entry["loss"]
            )[:MAX_MICRO_BATCHES]
        origins = self.loader.origins(violation.step - 1)
        size = len(origins) // (self.loader.dp_size * len(result.micro_losses))
        for entry in worst:  # number k of rank r is micro batch r + k * ranks of the step
            first = (entry["rank"] + entry["micro_batch"] * self.loader.dp_size) * size
            entry["sequences"] = [describe(origin) for origin in origins[first : first + size]]
        details = {
            "in_a_row": violation.in_a_row,
            "grad_norm": finite(result.grad_norm),
            "micro_batches": worst,
        }
        self._write(violation.guard, violation.action, violation.step, violation.reason, details)
        self._say(violation, worst, nothing_found=found == [])

    def tell(self, violation: Violation, **details: Any) -> None:
        """An incident that is not of one batch. Only rank 0 tells it."""
        if self.topology.is_main:
            self._write(
                violation.guard, violation.action, violation.step, violation.reason, details
            )
            self._say(violation, [], nothing_found=False)

    def tell_stall(self, seconds: float, reading: str) -> None:
        """A batch that has not come on this rank."""
        reason = f"rank {self.topology.rank} has waited {seconds:.0f} seconds for a batch while {reading} is read"
        self._write(
            "stalled_data",
            "warn",
            None,
            reason,
            {"rank": self.topology.rank, "seconds": seconds, "reading": reading},
        )
        logger.warning("%s", reason)
        tqdm.write(f"warning: {reason}; training waits", file=sys.stderr)

    def _write(
        self, guard: str, action: str, step: int | None, reason: str, details: dict[str, Any]
    ) -> None:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "guard": guard,
            "action": action,
            "step": step,
            "reason": reason,
        } | details
        logger.warning("incident: %s", json.dumps(entry))
        # One write of a whole line: several ranks may append to the file.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _say(self, violation: Violation, worst: list[dict[str, Any]], nothing_found: bool) -> None:
        if violation.in_a_row > 1 and violation.action == "warn":
            return  # it is still the same, and all of it is in the file
        where = ""
        if nothing_found:
            where = "; it did not happen again when the step was repeated: suspect the hardware"
        elif worst:
            entry = worst[0]
            what = (
                f", {entry['not_finite']}"
                if "not_finite" in entry
                else f", loss {math.nan if entry['loss'] is None else entry['loss']:.4f}"
            )
            documents = entry["sequences"][0] if entry["sequences"] else "documents no longer known"
            others = (
                f" and {len(worst) - 1} more" if len(worst) > 1 and "not_finite" in entry else ""
            )
            where = f"; rank {entry['rank']}, micro batch {entry['micro_batch']}{what}: {documents}{others}"
        tqdm.write(
            f"warning: step {violation.step}: {violation.reason}{where}; {DONE[violation.action]} ({self.path})",
            file=sys.stderr,
        )


def describe(origin: Origin) -> str:
    """A sequence's source and documents in one line."""
    parts = []
    for place, first, last in origin.documents:
        numbers = (
            f"document {first}"
            if first == last
            else f"documents {first} to {'the last' if last < 0 else last}"
        )
        parts.append(f"{numbers} in {place}")
    return f"{origin.source}: {', '.join(parts)}"


def finite(value: float) -> float | None:
    """As JSON has it, which knows no NaN; ZeRO reports a norm that is not finite as -1."""
    return value if math.isfinite(value) and value >= 0 else None
