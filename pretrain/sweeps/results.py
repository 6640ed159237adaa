"""Results of a sweep as records: a row for each point, and the mean over each point's seeds."""

from __future__ import annotations

import math
import shlex
import statistics
from collections import Counter
from dataclasses import asdict, dataclass, replace

from pretrain.sweeps.axes import Point, short_names
from pretrain.sweeps.benchmarks import combined_score, sweep_tasks, task_scores
from pretrain.sweeps.study import Record, RunResult, State, Study


@dataclass(frozen=True)
class PointRow:
    """One row of the table of results.

    Attributes:
        run: the point whose run this row shows; points of equal recipes share one.
        group: the point's name without its seed.
        axes: the value of each axis, by the name of its column; None if the axis is not varied.
        validation_loss: nats a token over the whole validation split.
        scores: of each task that the base recipe's ``evaluation`` names, from 0 to 1.
        combined_score: see :data:`pretrain.sweeps.benchmarks.FORMULA`.
        attempts: how many times the run was started.
        exit_code: of the last attempt.
    """

    point: str
    run: str
    state: State
    group: str
    seed: int | None
    axes: dict[str, str | None]
    validation_loss: float | None
    perplexity: float | None
    scores: dict[str, float | None]
    combined_score: float | None
    parameters_total: int | None
    parameters_active: int | None
    active_share: float | None
    train_tokens: int | None
    steps: int | None
    tokens_per_second: float | None
    train_seconds: float | None
    attempts: int
    exit_code: int | None
    error: str | None
    overrides: str

    def to_dict(self) -> dict[str, object]:
        """The row as CSV and JSON have it: each axis and each task is a column of its own."""
        columns: dict[str, object] = {}
        for name, value in asdict(self).items():
            if name == "scores":
                columns |= {f"score_{task}": score for task, score in value.items()}
            else:
                columns |= value if name == "axes" else {name: value}
        return columns


@dataclass(frozen=True)
class GroupResult:
    """A point whose run has finished: the mean over its seeds.

    The perplexity is that of the mean loss, so that both give the same order.

    Attributes:
        rank: from 1, best first; 0 outside of a ranking.
        also: other points that have the same runs, because their recipes are equal.
        values, numbers: the label of each axis, and its number if it has one.
        seeds, seeds_asked: how many have finished, of how many.
        spread: sample standard deviation of the loss; None for a single seed.
        scores, combined_score: as in :class:`PointRow`; means over the seeds that have them.
        overrides: what sets the point's values, without the seed.
    """

    rank: int
    point: str
    also: list[str]
    run_names: list[str]
    values: dict[str, str | None]
    numbers: dict[str, float]
    seeds: int
    seeds_asked: int
    validation_loss: float
    spread: float | None
    perplexity: float
    parameters_total: int
    parameters_active: int
    active_share: float
    train_tokens: int
    tokens_per_second: float
    overrides: list[str]
    scores: dict[str, float]
    combined_score: float | None

    @property
    def is_complete(self) -> bool:
        """Whether every seed has finished."""
        return self.seeds == self.seeds_asked

    def to_dict(self) -> dict[str, object]:
        """The result as JSON has it."""
        return asdict(self)


def point_rows(study: Study) -> list[PointRow]:
    """One row for each point, in order; points of equal recipes share a run and its result."""
    return [_row(study, point) for point in study.points]


def _row(study: Study, point: Point) -> PointRow:
    names = short_names(list(study.design.axes))
    record = study.record(point)
    # Before a run has ended there is no result, and every key of it is missing.
    result: RunResult | dict[str, None] = record.result or {}
    total = result.get("parameters_total")
    active = result.get("parameters_active")
    tasks = sweep_tasks(study.design.base)
    scores = _scores(study, record)
    return PointRow(
        point=point.name,
        run=point.run,
        state=record.state,
        group=point.group,
        seed=point.seed,
        axes={f"axis_{names[axis]}": point.values.get(axis) for axis in study.design.axes},
        validation_loss=record.loss,
        perplexity=None if record.loss is None else math.exp(record.loss),
        scores={task: scores.get(task) for task in tasks},
        combined_score=combined_score(scores, tasks),
        parameters_total=total,
        parameters_active=active,
        active_share=active / total if total and active else None,
        train_tokens=result.get("train_tokens"),
        steps=result.get("steps"),
        tokens_per_second=result.get("tokens_per_second"),
        train_seconds=result.get("train_seconds"),
        attempts=len(record.attempts),
        exit_code=record.attempts[-1].get("exit_code") if record.attempts else None,
        error=record.error,
        overrides=shlex.join(point.overrides),
    )


def ranking(study: Study) -> list[GroupResult]:
    """Finished points, best first; points of the same recipe are one entry.

    Points with unfinished seeds come last: a seed that diverged would be missing in their mean.
    """
    entries: dict[tuple[str, ...], GroupResult] = {}
    for entry in finished_groups(study):
        first = entries.setdefault(tuple(entry.run_names), entry)
        if first is not entry:
            first.also.append(entry.point)
    ranked = sorted(
        entries.values(), key=lambda entry: (not entry.is_complete, entry.validation_loss)
    )
    return [replace(entry, rank=index + 1) for index, entry in enumerate(ranked)]


def finished_groups(study: Study) -> list[GroupResult]:
    """Each point with a finished seed, in order, with the mean over its finished seeds."""
    asked = Counter(point.group for point in study.points)
    members: dict[str, list[tuple[Point, Record]]] = {}
    for point in study.points:
        record = study.record(point)
        if record.loss is not None:
            members.setdefault(point.group, []).append((point, record))
    return [_group(study, name, asked[name], found) for name, found in members.items()]


def _group(study: Study, name: str, asked: int, members: list[tuple[Point, Record]]) -> GroupResult:
    results = [record.result for _, record in members if record.result is not None]
    losses = [record.loss for _, record in members if record.loss is not None]
    first = results[0]
    point = members[0][0]
    # The record's own point: of points that share a run, it is the one that was started.
    started = members[0][1].point
    mean = statistics.fmean(losses)
    tasks = sweep_tasks(study.design.base)
    scores = _mean_scores(study, [record for _, record in members])
    return GroupResult(
        rank=0,
        point=name,
        also=[],
        run_names=[member.run for member, _ in members],
        values={axis: point.values.get(axis) for axis in study.design.axes},
        numbers=started.numbers,
        seeds=len(losses),
        seeds_asked=asked,
        validation_loss=mean,
        spread=statistics.stdev(losses) if len(losses) > 1 else None,
        perplexity=math.exp(mean),
        parameters_total=first["parameters_total"],
        parameters_active=first["parameters_active"],
        active_share=first["parameters_active"] / first["parameters_total"],
        train_tokens=first["train_tokens"],
        tokens_per_second=statistics.fmean(
            result["tokens_per_second"] or 0.0 for result in results
        ),
        overrides=[
            override for override in started.overrides if override != f"seed={started.seed}"
        ],
        scores=scores,
        combined_score=combined_score(scores, tasks),
    )


def _scores(study: Study, record: Record) -> dict[str, float]:
    """The scores by task of a run's end; empty if it has not finished, or none were measured."""
    tasks = sweep_tasks(study.design.base)
    if not tasks or record.loss is None or not record.result:
        return {}
    return task_scores(study.run_folder(record.point.run), tasks, record.result["steps"])


def _mean_scores(study: Study, records: list[Record]) -> dict[str, float]:
    """The mean of each task over the runs that have it."""
    found: dict[str, list[float]] = {}
    for record in records:
        for task, score in _scores(study, record).items():
            found.setdefault(task, []).append(score)
    return {task: statistics.fmean(scores) for task, scores in found.items()}


def incomparable(study: Study) -> str | None:
    """A warning if the runs' losses are over different text, so that their order means nothing."""
    seen: dict[str, set[str]] = {}
    for point in study.runs:
        for name, value in point.measured_on.items():
            seen.setdefault(name, set()).add(value)
    differing = [name for name, values in seen.items() if len(values) > 1]
    if not differing:
        return None
    what = " or ".join(differing)
    return (
        f"runs that differ in {what} have validation losses over different windows, which do not"
        " compare: rank only runs that share it"
    )


def states(study: Study) -> dict[str, int]:
    """How many runs are in each state."""
    return dict(Counter(study.record(point).state for point in study.runs))
