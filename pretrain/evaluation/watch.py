"""Evaluates each new checkpoint of a run, in a separate process that training does not wait for.

Results go to ``evaluations.jsonl`` in the run's folder and to ``tensorboard/evaluation``, not to
metrics.jsonl: that file has one writer, the training.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from pretrain.checkpoint.layout import (
    MANIFEST,
    complete_checkpoints,
    read_run_recipe,
    read_state,
    step_of,
)
from pretrain.config.timeline import Timeline
from pretrain.core.errors import CheckpointError
from pretrain.core.files import JsonObject, file_sha256, write_synced
from pretrain.evaluation.report import numbers, write_tensorboard
from pretrain.evaluation.result import EvaluationResult

EVALUATIONS = "evaluations.jsonl"
POLL_SECONDS = 2.0
Evaluate = Callable[[Path], EvaluationResult]
# A line of evaluations.jsonl: "kind", "step" and "manifest", then each number by its path in the
# result, such as "by_source/python/loss"; "texts" is the only nested field.
EvaluationRecord = JsonObject


class Parent(NamedTuple):
    """The training that started the watching process.

    Attributes:
        step: that the training resumes from.
        last_step: that it will end with.
    """

    pid: int
    step: int
    last_step: int


def read_evaluations(run: Path) -> list[EvaluationRecord]:
    """The records of the run's evaluations.jsonl; a line torn by a kill is left out."""
    path = run / EVALUATIONS
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def forget_after(run: Path, step: int) -> None:
    """Removes the records of later steps, when a run resumes from an earlier checkpoint.

    No other process may watch the run meanwhile.
    """
    records = read_evaluations(run)
    if any(one["step"] > step for one in records):
        _write(run, [one for one in records if one["step"] <= step])


def _write(run: Path, records: Iterable[EvaluationRecord]) -> None:
    write_synced(run / EVALUATIONS, "".join(json.dumps(one) + "\n" for one in records).encode())


def record(run: Path, step: int, manifest: str, result: EvaluationResult) -> None:
    """Adds a record, in place of an earlier one of the same step, and writes it to TensorBoard.

    Args:
        manifest: sha256 of the checkpoint's manifest: after a restart there may be another
            checkpoint of the same step.
    """
    added: EvaluationRecord = {"kind": "evaluation", "step": step, "manifest": manifest}
    added |= dict(numbers({name: value for name, value in result.items() if name != "step"}))
    if "texts" in result:
        added["texts"] = result["texts"]
    others = [other for other in read_evaluations(run) if other["step"] != step]
    _write(run, [*others, added])
    # Only the newest may hide what TensorBoard has of later steps: those are of a run that was
    # reset, unless an older checkpoint is evaluated late.
    newest = all(other["step"] < step for other in others)
    write_tensorboard(result, run / "tensorboard" / "evaluation", step, forget_later=newest)


def watch(
    run: Path,
    evaluate: Evaluate,
    interval_steps: int = 1,
    parent: Parent | None = None,
) -> int:
    """Evaluates checkpoints, oldest first, until that of the run's last step; returns how many.

    A checkpoint that training removes meanwhile is skipped.

    Args:
        interval_steps: only steps that are a multiple of it, and the last one.
        parent: the training, which knows the last step; by default the recipe of the newest
            checkpoint does. The watch ends with the parent's process.

    Raises:
        CheckpointError: if the run has no folder.
    """
    if not run.is_dir():
        raise CheckpointError(f"there is no run {run}: give the folder that training writes to")
    count = 0
    last_done = False
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
        # When the training dies, this process gets another parent.
        if parent is not None and os.getppid() != parent.pid:
            break
        if not last_done:
            time.sleep(POLL_SECONDS)
    return count


def _is_last(checkpoint: Path, parent: Parent | None) -> bool:
    step = step_of(checkpoint)
    stopped_early = read_state(checkpoint).get("progress", {}).get("stopped_early", False)
    if parent is None:
        return stopped_early or step >= Timeline(read_run_recipe(checkpoint)).num_steps
    # The checkpoint that the training resumes from may have been the last one of an earlier start,
    # with fewer tokens or less patience.
    return step >= parent.last_step or (stopped_early and step > parent.step)


def _evaluate_once(run: Path, checkpoint: Path, evaluate: Evaluate) -> bool:
    """Evaluates a checkpoint unless it was evaluated before; returns whether it did."""
    manifest = file_sha256(checkpoint / MANIFEST)
    if any(one.get("manifest") == manifest for one in read_evaluations(run)):
        return False
    record(run, step_of(checkpoint), manifest, evaluate(checkpoint))
    return True
