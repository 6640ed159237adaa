"""Evaluates each new checkpoint of a run, in a process of its own: training does not wait for it,
and shares neither memory nor groups with it.

Results go to ``evaluations.jsonl`` in the run's folder and to ``tensorboard/evaluation``:
metrics.jsonl has one writer, the training.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.checkpoint.layout import (
    MANIFEST,
    complete_checkpoints,
    read_run_recipe,
    read_state,
    step_of,
)
from pretrain.config.timeline import Timeline
from pretrain.core.errors import CheckpointError
from pretrain.core.files import file_sha256, write_synced
from pretrain.evaluation.report import numbers, write_tensorboard

EVALUATIONS = "evaluations.jsonl"
POLL_SECONDS = 2.0
Row = dict[str, Any]


class Parent(NamedTuple):
    """The training that started the watching process: its id, the step that it goes on from, and
    its last one.
    """

    pid: int
    step: int
    last_step: int


def read_evaluations(run: Path) -> list[Row]:
    """The rows of the run's evaluations.jsonl; a line torn by a kill is left out."""
    path, rows = run / EVALUATIONS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def forget_after(run: Path, step: int) -> None:
    """Removes the rows of later steps, which are taken again.

    No other process may watch the run meanwhile.
    """
    rows = read_evaluations(run)
    if any(row["step"] > step for row in rows):
        _write(run, [row for row in rows if row["step"] <= step])


def _write(run: Path, rows: Iterable[Row]) -> None:
    write_synced(run / EVALUATIONS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def record(run: Path, step: int, manifest: str, result: dict[str, Any]) -> None:
    """Adds a row, in place of an earlier one of the same step, and writes it to TensorBoard.

    Args:
        manifest: sha256 of the checkpoint's manifest, which tells it from another one of the same
            step.
    """
    row: Row = {"kind": "evaluation", "step": step, "manifest": manifest}
    row |= dict(numbers({name: value for name, value in result.items() if name != "step"}))
    others = [other for other in read_evaluations(run) if other["step"] != step]
    _write(run, [*others, row | ({"texts": result["texts"]} if "texts" in result else {})])
    newest = all(other["step"] < step for other in others)
    write_tensorboard(result, run / "tensorboard" / "evaluation", step, forget_later=newest)


def watch(
    run: Path,
    evaluate: Callable[[Path], dict[str, Any]],
    interval_steps: int = 1,
    parent: Parent | None = None,
) -> int:
    """Evaluates checkpoints, oldest first, until that of the run's last step is done; returns how
    many.

    A checkpoint that training removes meanwhile is passed over.

    Args:
        interval_steps: only steps that are a multiple of it, and the last one.
        parent: knows which step is the last one, where otherwise the newest checkpoint's recipe
            does; the watch ends with its process.

    Raises:
        CheckpointError: where the run has no folder.
    """
    if not run.is_dir():
        raise CheckpointError(f"there is no run {run}: give the folder that training writes to")
    count, last_done = 0, False
    while not last_done:
        for checkpoint in reversed(complete_checkpoints(run / "checkpoints")):
            try:
                last_done = _is_last(checkpoint, parent)
                if last_done or step_of(checkpoint) % interval_steps == 0:
                    count += _evaluate_once(run, checkpoint, evaluate)
            except (CheckpointError, OSError) as error:
                if checkpoint.is_dir():
                    raise
                print(
                    f"{checkpoint.name} was removed before it was evaluated ({error}): evaluation"
                    " is slower than saving",
                    file=sys.stderr,
                )
        if parent is not None and os.getppid() != parent.pid:
            break
        if not last_done:
            time.sleep(POLL_SECONDS)
    return count


def _is_last(checkpoint: Path, parent: Parent | None) -> bool:
    step, stopped_early = (
        step_of(checkpoint),
        read_state(checkpoint).get("progress", {}).get("stopped_early", False),
    )
    if parent is None:
        return stopped_early or step >= Timeline(read_run_recipe(checkpoint)).num_steps
    # What the training goes on from may have been the end of an earlier start, with fewer tokens or
    # less patience.
    return step >= parent.last_step or (stopped_early and step > parent.step)


def _evaluate_once(run: Path, checkpoint: Path, evaluate: Callable[[Path], dict[str, Any]]) -> bool:
    """Whether the checkpoint was not evaluated before."""
    manifest = file_sha256(checkpoint / MANIFEST)
    if any(row.get("manifest") == manifest for row in read_evaluations(run)):
        return False
    record(run, step_of(checkpoint), manifest, evaluate(checkpoint))
    return True
