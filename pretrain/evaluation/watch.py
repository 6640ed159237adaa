"""Evaluates each new checkpoint of a run, in a process of its own: training does not wait for it, and shares neither memory nor groups with it.

Results go to ``evaluations.jsonl`` in the run's folder and to ``tensorboard/evaluation``: metrics.jsonl has one writer, the training.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.checkpoint.layout import STEP_NAME, complete_checkpoints, read_run_recipe, read_state
from pretrain.config.errors import CheckpointError
from pretrain.config.timeline import Timeline
from pretrain.evaluation.report import numbers, write_tensorboard

EVALUATIONS = "evaluations.jsonl"
POLL_SECONDS = 2.0


def evaluated_steps(run: Path) -> set[int]:
    """Steps with a result; a last line torn by a kill does not count."""
    path, steps = run / EVALUATIONS, set()
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            steps.add(int(json.loads(line)["step"]))
        except ValueError:
            continue
    return steps


def record(run: Path, step: int, result: dict[str, Any]) -> None:
    """Appends a row, and writes it to TensorBoard."""
    row = {"kind": "evaluation", "step": step, **dict(numbers({name: value for name, value in result.items() if name != "step"}))}
    path = run / EVALUATIONS
    torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(row | ({"texts": result["texts"]} if "texts" in result else {})) + "\n")
    write_tensorboard(result, run / "tensorboard" / "evaluation", step)


def watch(run: Path, evaluate: Callable[[Path], dict[str, Any]], interval_steps: int = 1, parent: int | None = None) -> int:
    """Evaluates checkpoints, oldest first, until that of the run's last step is done; returns how many.

    A checkpoint that training removes meanwhile is passed over.

    Args:
        interval_steps: only steps that are a multiple of it, and the last one.
        parent: ends where this process is no longer the one that started it.

    Raises:
        CheckpointError: where the run has no folder.
    """
    if not run.is_dir():
        raise CheckpointError(f"there is no run {run}: give the folder that training writes to")
    done, count, last_done = evaluated_steps(run), 0, False
    while not last_done:
        for checkpoint in reversed(complete_checkpoints(run / "checkpoints")):
            try:
                last_done, new = _evaluate_once(run, checkpoint, evaluate, interval_steps, done)
                count += new
            except (CheckpointError, OSError) as error:
                if checkpoint.is_dir():
                    raise
                print(f"{checkpoint.name} was removed before it was evaluated ({error}): evaluation is slower than saving", file=sys.stderr)
        if parent is not None and os.getppid() != parent:
            break
        if not last_done:
            time.sleep(POLL_SECONDS)
    return count


def _evaluate_once(run: Path, checkpoint: Path, evaluate: Callable[[Path], dict[str, Any]], interval_steps: int, done: set[int]) -> tuple[bool, bool]:
    """Whether this is the run's last checkpoint, and whether it was evaluated just now."""
    step = int(STEP_NAME.match(checkpoint.name)[1])  # type: ignore[index]
    stopped_early = read_state(checkpoint).get("progress", {}).get("stopped_early", False)
    is_last = stopped_early or step >= Timeline(read_run_recipe(checkpoint)).num_steps
    if step in done or not (is_last or step % interval_steps == 0):
        return is_last, False
    record(run, step, evaluate(checkpoint))
    done.add(step)
    return is_last, True
