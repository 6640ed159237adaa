"""The report of a sweep: a CSV table of all points, a ranking in Markdown, and plots."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich.table import Table

from pretrain.config.next_command import training_command
from pretrain.core.files import write_synced
from pretrain.sweeps.axes import BASE, Axis, file_name, short_names
from pretrain.sweeps.benchmarks import FORMULA, sweep_tasks
from pretrain.sweeps.plots import draw_axes, draw_scores, draw_sizes
from pretrain.sweeps.results import (
    GroupResult,
    PointRow,
    finished_groups,
    incomparable,
    point_rows,
    ranking,
    states,
)
from pretrain.sweeps.study import DS_CONFIG, TRIAL, Study

SHOWN_ROWS = 20
COLUMNS = (
    "rank",
    "point",
    "perplexity",
    "loss",
    "runs",
    "parameters",
    "active",
    "share",
    "tokens/s",
)
AXIS_COLUMNS = ("perplexity", "validation loss", "runs", "against base", "parameters", "share")
UNFINISHED = ("failed", "refused", "pruned", "interrupted", "running", "waiting")
COMBINED = "combined_score"
PLOTS = ("params_vs_perplexity", "active_ratio_vs_perplexity", "axes_vs_perplexity")


def write_report(study: Study) -> dict[str, Path]:
    """Writes the table, the ranking and the plots; returns their paths by kind.

    Each file replaces that of an earlier report atomically.
    """
    rows = point_rows(study)
    ranked = ranking(study)
    records = [row.to_dict() for row in rows]
    output = study.output
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]) if records else ["point"])
    writer.writeheader()
    writer.writerows(records)
    paths = {"csv": output / f"{study.design.kind}_results.csv", "markdown": output / "report.md"}
    write_synced(paths["csv"], text.getvalue().encode())
    write_synced(paths["markdown"], markdown(study, rows, ranked).encode())
    if ranked:
        against_base = study.design.search == "each"
        drawn = (
            draw_sizes(ranked, [entry.parameters_total for entry in ranked], "parameters"),
            draw_sizes(ranked, [entry.active_share for entry in ranked], "active / all parameters"),
            draw_axes(finished_groups(study), study.design.parsed_axes(), against_base),
        )
        pictures = dict(zip(PLOTS, drawn, strict=True)) | score_pictures(study, ranked)
        for name, picture in pictures.items():
            paths[name] = output / f"{name}.png"
            write_synced(paths[name], picture)
    return paths


def score_pictures(study: Study, ranked: list[GroupResult]) -> dict[str, bytes]:
    """A plot for each task that any point has a score of, and one of the combined score."""
    pictures = {}
    for task in sweep_tasks(study.design.base):
        entries = [entry for entry in ranked if task in entry.scores]
        if entries:
            scores = [entry.scores[task] for entry in entries]
            pictures[_score_plot(task)] = draw_scores(entries, scores, f"score of {task}")
    whole = [(entry, entry.combined_score) for entry in ranked if entry.combined_score is not None]
    if whole:
        entries, combined = [entry for entry, _ in whole], [score for _, score in whole]
        pictures[_score_plot(COMBINED)] = draw_scores(entries, combined, "combined score")
    return pictures


def _score_plot(task: str) -> str:
    return f"total_params_vs_{file_name(task)}"


def _loss_text(entry: GroupResult) -> str:
    spread = "" if entry.spread is None else f" ± {entry.spread:.4f}"
    return f"{entry.validation_loss:.4f}{spread}"


def _runs_text(entry: GroupResult) -> str:
    return str(entry.seeds) if entry.is_complete else f"{entry.seeds} of {entry.seeds_asked}"


def _point_text(entry: GroupResult) -> str:
    """The point's name; for a search, whose points are only numbered, also its values."""
    names = short_names(list(entry.values))
    text = entry.point
    if text.startswith(TRIAL):
        text += f" ({', '.join(f'{names[axis]}={value}' for axis, value in entry.values.items())})"
    return text + (f" (also {', '.join(entry.also)})" if entry.also else "")


def _cells(entry: GroupResult) -> list[str]:
    return [
        str(entry.rank),
        _point_text(entry),
        f"{entry.perplexity:.4g}",
        _loss_text(entry),
        _runs_text(entry),
        f"{entry.parameters_total:,}",
        f"{entry.parameters_active:,}",
        f"{entry.active_share:.1%}",
        f"{entry.tokens_per_second:,.0f}",
    ]


def terminal_table(study: Study, ranked: list[GroupResult]) -> Table:
    """The best points of the ranking, for the terminal."""
    more = f", the best {SHOWN_ROWS} of {len(ranked)}" if len(ranked) > SHOWN_ROWS else ""
    table = Table(*COLUMNS, title=f"{study.design.kind} of {study.design.recipe}{more}")
    for entry in ranked[:SHOWN_ROWS]:
        table.add_row(*(_escaped(cell) for cell in _cells(entry)))
    return table


def _escaped(cell: str) -> str:
    # rich reads "[...]" as markup.
    return cell.replace("[", "\\[")


def _markdown_table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def markdown(study: Study, rows: list[PointRow], ranked: list[GroupResult]) -> str:
    """The whole report as Markdown."""
    parts = [f"# {study.design.kind.capitalize()} of {study.design.recipe}", _setup(study, ranked)]
    if note := incomparable(study):
        parts.append(f"**Warning:** {note}.")
    if ranked:
        parts += ["## Ranking", _markdown_table(COLUMNS, [_cells(entry) for entry in ranked])]
        parts.append(f"The best one: `{_command_of(study, ranked[0])}`")
    tasks = sweep_tasks(study.design.base)
    scored = [entry for entry in ranked if entry.scores]
    if scored:
        parts += ["## Benchmarks", _score_table(tasks, scored), FORMULA]
    if study.design.search == "each":
        parts += _axis_sections(study)
    if unfinished := _unfinished_cells(study, rows):
        columns = ("point", "state", "exit code", "why")
        parts += ["## Not finished", _markdown_table(columns, unfinished)]
    if ranked:
        named = [*PLOTS, *(_score_plot(task) for task in tasks if _any_score(scored, task))]
        if any(entry.combined_score is not None for entry in scored):
            named.append(_score_plot(COMBINED))
        parts += ["## Pictures", *(f"![{name}]({name}.png)" for name in named)]
    return "\n\n".join(parts) + "\n"


def _any_score(entries: list[GroupResult], task: str) -> bool:
    return any(task in entry.scores for entry in entries)


def _score_table(tasks: list[str], entries: list[GroupResult]) -> str:
    """A row for each point, the best combined score first."""

    def shown(score: float | None) -> str:
        return "" if score is None else f"{score:.4f}"

    best_first = sorted(entries, key=lambda entry: -(entry.combined_score or 0.0))
    rows = [
        [_point_text(entry), shown(entry.combined_score)]
        + [shown(entry.scores.get(task)) for task in tasks]
        for entry in best_first
    ]
    return _markdown_table(("point", "combined score", *tasks), rows)


def _setup(study: Study, ranked: list[GroupResult]) -> str:
    """How the runs were made, in a sentence or two."""
    design = study.design
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states(study).items()))
    lengths = " or ".join(f"{count:,}" for count in sorted({one.train_tokens for one in ranked}))
    tokens = f", {lengths} tokens a run" if lengths else ""
    spread = ", mean ± standard deviation over seeds" if design.seeds else ""
    return (
        f"{len(study.points)} points, {len(study.runs)} runs ({counts}); search {design.search},"
        f" {design.ranks} ranks a run{tokens}. Losses are nats a token over the whole validation"
        f" split{spread}."
    )


def _command_of(study: Study, best: GroupResult) -> str:
    """The command line that trains a point's recipe."""
    # The sweep's own recipe and ds_config hold what it was started with.
    return training_command(
        study.base_recipe,
        best.overrides,
        ranks=study.design.ranks,
        ds_config=study.output / DS_CONFIG,
    )


def _unfinished_cells(study: Study, rows: list[PointRow]) -> list[list[str]]:
    """A table row for each run without a result, and for each point that was left out."""
    cells = [
        [row.point, row.state, "" if row.exit_code is None else str(row.exit_code), row.error or ""]
        for row in rows
        # Of points that share a run, only the one that it is named after is listed.
        if row.state in UNFINISHED and row.run == row.point
    ]
    left_out = [[entry["name"], "left out", "", entry["reason"]] for entry in study.skipped]
    return cells + left_out


def _axis_sections(study: Study) -> list[str]:
    """For one axis at a time: each value next to the base recipe."""
    groups = finished_groups(study)
    base = next((entry for entry in groups if entry.point == BASE), None)
    parts = []
    for axis in study.design.parsed_axes():
        lines = _axis_lines(axis, groups, base)
        if lines:
            parts += [f"## {axis.name}", _markdown_table((axis.name, *AXIS_COLUMNS), lines)]
    return parts


def _axis_lines(axis: Axis, groups: list[GroupResult], base: GroupResult | None) -> list[list[str]]:
    order = {option.label: index for index, option in enumerate(axis.options)}
    labelled = [
        (label, entry) for entry in groups if (label := entry.values.get(axis.name)) is not None
    ]
    labelled.sort(key=lambda pair: order[pair[0]])
    return [
        [
            label,
            f"{entry.perplexity:.4g}",
            _loss_text(entry),
            _runs_text(entry),
            "" if base is None else f"{entry.validation_loss - base.validation_loss:+.4f}",
            f"{entry.parameters_total:,}",
            f"{entry.active_share:.1%}",
        ]
        for label, entry in labelled
    ]
