"""A run's ledger is one chain, and its check finds what was edited, removed or swapped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.layout import RECIPE, STATE, file_entry, step_folder, write_manifest
from pretrain.checkpoint.ledger import LEDGER, Ledger, Origin, SegmentFacts, record_hash
from pretrain.checkpoint.trace import Trace, check_ledger
from pretrain.core.errors import CheckpointError
from pretrain.core.files import file_sha256

FACTS: SegmentFacts = {
    "code": {"version": "1", "sources": "c" * 64},
    "data": "d" * 64,
    "recipe": "e" * 64,
    "world_size": 2,
    "ep_size": 2,
    "sp_size": 1,
    "zero_stage": 1,
}


def publish(run: Path, ledger: Ledger | None, step: int, content: str = "weights") -> Path:
    """A checkpoint's folder with three small files, recorded as the store does."""
    folder = step_folder(run / "checkpoints", step)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"file": f"{content} {step}", RECIPE: "name: x", STATE: f'{{"step": {step}}}'}
    for name, text in texts.items():
        (folder / name).write_text(text)
    manifest = write_manifest(folder, {name: file_entry(folder / name) for name in texts})
    if ledger is not None:
        ledger.checkpoint(step, manifest)
    return folder


def origin(folder: Path) -> Origin:
    return {"kind": "checkpoint", "manifest": file_sha256(folder / "manifest.json")}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three starts, with a kill after step 8 that goes back to 6, a rollback from 9 to 6."""
    ledger = Ledger(tmp_path)
    ledger.start(0, {"kind": "new"}, FACTS)
    publish(tmp_path, ledger, 3)
    sixth = publish(tmp_path, ledger, 6)
    ledger = Ledger(tmp_path)
    ledger.start(6, origin(sixth), {**FACTS, "world_size": 1, "ep_size": 1})
    publish(tmp_path, ledger, 9)
    ledger.rollback(sixth)
    ninth = publish(tmp_path, ledger, 9, "other weights")
    Ledger(tmp_path).start(9, origin(ninth), FACTS)
    return tmp_path


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / LEDGER).read_text().splitlines()]


def rewrite(run: Path, change: Callable[[list[dict[str, Any]]], None]) -> Trace:
    """The check of a ledger whose records were changed."""
    found = records(run)
    change(found)
    (run / LEDGER).write_text("".join(json.dumps(record) + "\n" for record in found))
    return check_ledger(run)


def test_a_run_over_crashes_and_moves_is_one_trace(run: Path) -> None:
    trace = check_ledger(run)
    assert trace.faults == []
    assert [(found.first_step, found.last_step) for found in trace.segments] == [
        (0, 6),
        (6, 9),
        (9, 9),
    ]
    assert trace.segments[1].rollbacks == [6]
    assert "; 2 ranks, ep_size 2, ZeRO 1; " in str(trace.segments[0])
    assert "one certified trace of 3 segments, steps 0 to 9" in trace.verdict
    assert trace.head == records(run)[-1]["sha256"]


def test_a_segment_names_the_ranks_that_share_a_sequence(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.start(0, {"kind": "new"}, {**FACTS, "sp_size": 2})
    publish(tmp_path, ledger, 3)
    assert "; 2 ranks, ep_size 2, sp_size 2, ZeRO 1; " in str(check_ledger(tmp_path).segments[0])


def test_an_edited_record_is_found(run: Path) -> None:
    assert "record 2 was edited" in rewrite(run, lambda found: found[2].update(step=5)).faults[0]


def test_an_edited_record_with_a_new_hash_is_found(run: Path) -> None:
    def change(found: list[dict[str, Any]]) -> None:
        found[2]["step"] = 5
        found[2]["sha256"] = record_hash(found[2])

    assert "record 3 does not continue" in rewrite(run, change).faults[0]


def test_a_removed_record_is_found(run: Path) -> None:
    assert "record 1 does not continue" in rewrite(run, lambda found: found.pop(1)).faults[0]


def test_records_removed_at_the_end_are_found_by_the_checkpoints(run: Path) -> None:
    fault = rewrite(run, lambda found: found.__delitem__(slice(3, None))).faults[0]
    assert "step_9 is in no record" in fault


def test_a_swapped_checkpoint_is_found(run: Path) -> None:
    publish(run, None, 6, "foreign")
    assert "step_6 is another checkpoint" in check_ledger(run).faults[0]


def test_a_damaged_checkpoint_is_found(run: Path) -> None:
    (run / "checkpoints" / "step_6" / "file").write_text("weightS 6")
    assert "step_6 is damaged: file does not have" in check_ledger(run).faults[0]


def test_a_segment_from_nowhere_is_found(run: Path) -> None:
    Ledger(run).start(6, {"kind": "checkpoint", "manifest": "f" * 64}, FACTS)
    assert "segment 4 began at step 6 with a checkpoint that no" in check_ledger(run).faults[0]


def test_a_start_without_the_checkpoints_of_before_is_found(run: Path) -> None:
    Ledger(run).start(0, {"kind": "new"}, FACTS)
    assert "segment 4 began anew" in check_ledger(run).faults[0]


def test_a_torn_record_is_tolerated_and_said(run: Path) -> None:
    whole = (run / LEDGER).read_bytes()
    (run / LEDGER).write_bytes(whole + b'{"number": 7, "eve')
    trace = check_ledger(run)
    assert trace.faults == [] and any("torn (18 bytes)" in note for note in trace.notes)
    Ledger(run).start(9, origin(run / "checkpoints" / "step_9"), FACTS)
    trace = check_ledger(run)
    assert trace.faults == [] and len(trace.segments) == 4
    assert any("torn record of 18 bytes was removed" in note for note in trace.notes)


def test_a_record_without_its_checkpoint_is_no_fault(run: Path) -> None:
    # A kill between the record and the checkpoint's name; and old checkpoints are removed.
    ledger = Ledger(run)
    ledger.start(9, origin(run / "checkpoints" / "step_9"), FACTS)
    folder = publish(run, ledger, 12)
    (folder / "manifest.json").unlink()
    assert check_ledger(run).faults == []


def test_a_run_of_before_the_ledger_is_certified_from_its_first_record_on(tmp_path: Path) -> None:
    third = publish(tmp_path, None, 3)
    ledger = Ledger(tmp_path)
    ledger.start(3, origin(third), FACTS)
    publish(tmp_path, ledger, 6)
    trace = check_ledger(tmp_path)
    assert trace.faults == []
    assert any("nothing is known of the steps before" in note for note in trace.notes)


def test_a_folder_without_a_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no ledger"):
        check_ledger(tmp_path)
