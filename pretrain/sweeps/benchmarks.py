"""Scores of lm-evaluation-harness in a sweep: what ``evaluation.tasks`` measured of each run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.core.files import JsonObject
from pretrain.evaluation.watch import read_evaluations

# A task may have several metrics: the first of these that it has is its score, from 0 to 1, and
# more is better. Names are those of evaluations.jsonl.
METRICS = (
    "acc_norm",
    "acc",
    "exact_match/strict-match",
    "exact_match",
    "pass@1/create_test",
    "pass@1",
    "bleu_acc",
)
FORMULA = (
    "The combined score is the mean over the tasks of each task's score, which is the first of"
    f" {', '.join(METRICS)} that it has; chance is not subtracted. A task that is a tag of several"
    " has the mean of theirs."
)


def sweep_tasks(base: JsonObject) -> list[str]:
    """The tasks that a base recipe, as a mapping, has its checkpoints evaluated on."""
    section = base.get("evaluation")
    tasks = section.get("tasks") if isinstance(section, dict) else None
    return [str(task) for task in tasks] if isinstance(tasks, list) else []


def task_scores(run: Path, tasks: Sequence[str], step: int) -> dict[str, float]:
    """The scores of a run's last checkpoint by task; a task without any is left out.

    Args:
        step: the run's last one; evaluations of earlier steps do not count.
    """
    records = [record for record in read_evaluations(run) if record.get("step") == step]
    if not records:
        return {}
    found = {task: _score(records[-1], task, tasks) for task in tasks}
    return {task: score for task, score in found.items() if score is not None}


def _score(record: JsonObject, task: str, tasks: Sequence[str]) -> float | None:
    own = _metric(record, task)
    if own is not None or any(path.startswith(f"tasks/{task}/") for path in record):
        return own
    # A tag, such as truthfulqa, has no record of its own, but its tasks have.
    names = {path.split("/")[1] for path in record if path.startswith(f"tasks/{task}_")}
    names -= set(tasks)
    members = [score for name in sorted(names) if (score := _metric(record, name)) is not None]
    return statistics.fmean(members) if members else None


def _metric(record: JsonObject, task: str) -> float | None:
    for metric in METRICS:
        value = record.get(f"tasks/{task}/{metric}")
        if isinstance(value, int | float):
            return float(value)
    return None


def combined_score(scores: Mapping[str, float], tasks: Sequence[str]) -> float | None:
    """See :data:`FORMULA`; None without tasks, or if one of them has no score."""
    if not tasks or any(task not in scores for task in tasks):
        return None
    return statistics.fmean(scores[task] for task in tasks)
