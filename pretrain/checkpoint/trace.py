"""Checks a run's ledger: one chain, no segment from nowhere, checkpoints as they were published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pretrain.checkpoint.layout import MANIFEST, complete_checkpoints, damage, step_of
from pretrain.checkpoint.ledger import (
    CHECKPOINT,
    LEDGER,
    ROLLBACK,
    START,
    record_hash,
    split_lines,
)
from pretrain.config.recipe import shared_sizes
from pretrain.core.errors import CheckpointError
from pretrain.core.files import JsonObject, file_sha256

CHECKPOINTS = "checkpoints"
# Of hashes in sentences.
SHORT = 12


@dataclass
class Segment:
    """One start of a run, until its end or the next start.

    Attributes:
        first_step: steps that were done when it began.
        last_step: of its last checkpoint; what was trained after it is lost.
        facts: the record of its start.
        checkpoints: that it has published.
        rollbacks: steps that it went back to.
    """

    number: int
    first_step: int
    last_step: int
    facts: JsonObject
    checkpoints: int = 0
    rollbacks: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        facts, code = self.facts, self.facts["code"]
        commit = f", commit {code['commit'][:SHORT]}" if code.get("commit") else ""
        commit += " with changes" if code.get("dirty") else ""
        # Records of older versions do not have it.
        shared = shared_sizes(facts.get("sp_size", 1), facts.get("tp_size", 1))
        back = "".join(f", went back to step {step}" for step in self.rollbacks)
        return (
            f"segment {self.number}: steps {self.first_step} to {self.last_step}, "
            f"{self.checkpoints} checkpoints{back}; {facts['world_size']} ranks, ep_size "
            f"{facts['ep_size']}{shared}, ZeRO {facts['zero_stage']}; code {code['version']}{commit}, "
            f"sources {code['sources'][:SHORT]}; data {facts['data'][:SHORT]}; "
            f"recipe {facts['recipe'][:SHORT]}"
        )


@dataclass
class Trace:
    """What a ledger says, and what speaks against it.

    Attributes:
        faults: one sentence each; empty for a whole trace.
        notes: what is allowed, and worth knowing.
        head: hash of the last record.
    """

    run: str
    segments: list[Segment] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    head: str = ""

    @property
    def verdict(self) -> str:
        """One sentence about a trace without faults."""
        first, last = self.segments[0].first_step, self.segments[-1].last_step
        count = sum(segment.checkpoints for segment in self.segments)
        return (
            f"{self.run}: one certified trace of {len(self.segments)} segments, steps {first} to "
            f"{last}, {count} checkpoints published; the last record is {self.head}"
        )

    def to_dict(self) -> JsonObject:
        """Return it as JSON has it."""
        return {
            "run": self.run,
            "certified": not self.faults,
            "faults": self.faults,
            "notes": self.notes,
            "segments": [asdict(segment) for segment in self.segments],
            "head": self.head,
        }


def check_ledger(run: Path) -> Trace:
    """Check the ledger in a run's folder; nothing is written.

    Raises:
        CheckpointError: if there is none.
    """
    path = run / LEDGER
    if not path.is_file():
        raise CheckpointError(
            f"{run} has no {LEDGER}: give the folder of a run that this version has trained"
        )
    trace = Trace(str(run))
    lines, torn = split_lines(path.read_bytes())
    if torn:
        trace.notes.append(
            f"the last record is torn ({len(torn)} bytes), as a kill leaves it; the next start "
            "removes it"
        )
    records = _read_chain(trace, lines)
    if records and not trace.faults:
        _follow(trace, records)
        _compare(trace, records, run)
    if not records and not trace.faults:
        trace.faults.append(f"{path} has no whole record: the run has no trace yet")
    return trace


def _read_chain(trace: Trace, lines: Sequence[bytes]) -> list[JsonObject]:
    """Decode the records, and check hashes, numbers and links; stop at the first fault."""
    records: list[JsonObject] = []
    previous = ""
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            own = record["sha256"]
        except (ValueError, KeyError, TypeError):
            trace.faults.append(f"record {number} is damaged: it is no JSON with a hash")
            return records
        if own != record_hash(record):
            trace.faults.append(f"record {number} was edited: it does not have the hash it names")
            return records
        if record.get("number") != number or record.get("previous") != previous:
            trace.faults.append(
                f"record {number} does not continue the one before it: records were removed, "
                "added or put in another order"
            )
            return records
        records.append(record)
        previous = own
    trace.head = previous
    return records


def _follow(trace: Trace, records: Sequence[JsonObject]) -> None:
    """Build the segments, and check that each begins at what an earlier one has published."""
    published: set[tuple[int, str]] = set()
    step = 0
    for record in records:
        event, here = record["event"], record["step"]
        if event == START:
            _begin(trace, record, published)
            step = here
            continue
        if not trace.segments:
            trace.faults.append("the first record is no start of a run")
            return
        segment = trace.segments[-1]
        pair = (here, record["manifest"])
        if event == CHECKPOINT:
            if here < step:
                trace.faults.append(
                    f"segment {segment.number} published step {here} after step {step}"
                )
            published.add(pair)
            segment.checkpoints += 1
            segment.last_step = here
        elif event == ROLLBACK:
            if pair not in published and pair not in _starts(trace):
                trace.faults.append(
                    f"segment {segment.number} went back to step {here}, to a checkpoint that no "
                    "segment published"
                )
            segment.rollbacks.append(here)
            segment.last_step = here
        else:
            trace.faults.append(f"record {record['number']} is of an unknown kind, '{event}'")
        step = here


def _starts(trace: Trace) -> set[tuple[int, str]]:
    """Checkpoints that segments began with, also those of another run."""
    return {
        (segment.first_step, segment.facts["from"].get("manifest", ""))
        for segment in trace.segments
    }


def _begin(trace: Trace, record: JsonObject, published: set[tuple[int, str]]) -> None:
    """Add the segment of a start, and check what it begins with."""
    step, origin = record["step"], record["from"]
    number = len(trace.segments) + 1
    if torn := record.get("removed_torn_bytes"):
        trace.notes.append(
            f"a torn record of {torn} bytes was removed when segment {number} began: the process "
            "before it was killed while it wrote"
        )
    kind = origin["kind"]
    if kind == "checkpoint":
        if not trace.segments:
            trace.notes.append(
                f"the ledger begins at step {step}: nothing is known of the steps before"
            )
        elif (step, origin["manifest"]) not in published | _starts(trace):
            trace.faults.append(
                f"segment {number} began at step {step} with a checkpoint that no earlier segment "
                "published"
            )
    elif published:
        trace.faults.append(
            f"segment {number} began anew at step {step}, although there were checkpoints: they "
            "were removed"
        )
    elif kind == "branch":
        trace.notes.append(
            f"segment {number} continues step {step} of another run, {origin['path']}"
        )
    elif "path" in origin:
        trace.notes.append(f"segment {number} began with the weights {origin['path']}")
    before = trace.segments[-1].facts if trace.segments else record
    for what in ("data", "recipe"):
        if before[what] != record[what]:
            trace.notes.append(f"segment {number} has another {what} than the one before it")
    if before["code"]["sources"] != record["code"]["sources"]:
        trace.notes.append(f"segment {number} was computed by other code than the one before it")
    trace.segments.append(Segment(number, step, step, record))


def _compare(trace: Trace, records: Sequence[JsonObject], run: Path) -> None:
    """Compare the checkpoints that are in the folder with what the ledger says of them."""
    newest = {
        record["step"]: record["manifest"] for record in records if record["event"] == CHECKPOINT
    }
    first = records[0]
    for folder in complete_checkpoints(run / CHECKPOINTS):
        step = step_of(folder)
        name = f"{CHECKPOINTS}/{folder.name}"
        if step not in newest:
            if first["from"]["kind"] == "checkpoint" and step <= first["step"]:
                trace.notes.append(f"{name} is older than the ledger")
            else:
                trace.faults.append(f"{name} is in no record: it was not published by this run")
        elif file_sha256(folder / MANIFEST) != newest[step]:
            trace.faults.append(f"{name} is another checkpoint than the one that was published")
        elif fault := damage(folder):
            trace.faults.append(f"{name} is damaged: {fault}")
