"""What came out of a sweep: a table of all points as CSV, a ranking over seeds, Markdown, and a
table for the terminal.
"""

from __future__ import annotations

import csv
import io
import math
import shlex
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table

from pretrain.core.files import write_synced
from pretrain.core.plugins import plugin_arguments
from pretrain.core.shipped import LAUNCHERS, shown
from pretrain.sweeps.axes import BASE, short_names
from pretrain.sweeps.plots import draw_axes, draw_sizes
from pretrain.sweeps.study import TRIAL, Record, Study

SHOWN_ROWS = 20
SIZES = ("parameters_total", "parameters_active")


def point_rows(study: Study) -> list[dict[str, Any]]:
    """One row a point, in order; points of equal recipes share a run and its result."""
    names = short_names(list(study.design.axes))
    rows = []
    for point in study.points:
        record = study.record(point)
        result, loss = record.result or {}, record.loss
        total, active = (result.get(name) for name in SIZES)
        row: dict[str, Any] = {
            "point": point.name,
            "run": point.run,
            "state": record.state,
            "group": point.group,
            "seed": point.seed,
        }
        row |= {f"axis_{names[axis]}": point.values.get(axis) for axis in study.design.axes}
        row |= {
            "validation_loss": loss,
            "perplexity": None if loss is None else math.exp(loss),
            "parameters_total": total,
            "parameters_active": active,
            "active_share": active / total if total and active else None,
            "train_tokens": result.get("train_tokens"),
            "steps": result.get("steps"),
            "tokens_per_second": result.get("tokens_per_second"),
            "train_seconds": result.get("train_seconds"),
            "attempts": len(record.attempts),
            "exit_code": record.attempts[-1].get("exit_code") if record.attempts else None,
            "error": record.error,
            "overrides": shlex.join(point.overrides),
        }
        rows.append(row)
    return rows


def ranking(study: Study) -> list[dict[str, Any]]:
    """Finished points, best first; points of the same recipe are one entry, with the others' names
    in ``also``.

    Points of which not every seed has finished are behind: what diverged would be missing in their
    mean.
    """
    entries: dict[tuple[str, ...], dict[str, Any]] = {}
    for entry in finished_groups(study):
        first = entries.setdefault(tuple(entry["run_names"]), entry)
        if first is not entry:
            first["also"].append(entry["point"])
    ranked = sorted(
        entries.values(),
        key=lambda entry: (entry["seeds"] < entry["seeds_asked"], entry["validation_loss"]),
    )
    return [{"rank": index + 1} | entry for index, entry in enumerate(ranked)]


def finished_groups(study: Study) -> list[dict[str, Any]]:
    """Each point, in order: the mean over its finished seeds, and the sample standard deviation
    where there are several.

    Perplexity is that of the mean loss, so that both give the same order.
    """
    asked = Counter(point.group for point in study.points)
    by_group: dict[str, list[tuple[dict[str, Any], Record]]] = {}
    for row, point in zip(point_rows(study), study.points, strict=True):
        if row["validation_loss"] is not None:
            by_group.setdefault(row["group"], []).append((row, study.record(point)))
    groups = []
    for name, members in by_group.items():
        losses = [row["validation_loss"] for row, _ in members]
        first, point = members[0][0], members[0][1].point
        mean = statistics.fmean(losses)
        entry = {
            "point": name,
            "also": [],
            "run_names": [row["run"] for row, _ in members],
            "values": {
                axis: first[key]
                for axis, key in zip(study.design.axes, _axis_columns(study), strict=True)
            },
            "numbers": point.numbers,
            "seeds": len(losses),
            "seeds_asked": asked[name],
            "validation_loss": mean,
            "spread": statistics.stdev(losses) if len(losses) > 1 else None,
            "perplexity": math.exp(mean),
            **{name: first[name] for name in (*SIZES, "active_share", "train_tokens")},
            "tokens_per_second": statistics.fmean(
                row["tokens_per_second"] or 0.0 for row, _ in members
            ),
            "overrides": [
                override for override in point.overrides if override != f"seed={point.seed}"
            ],
        }
        groups.append(entry)
    return groups


def _axis_columns(study: Study) -> list[str]:
    names = short_names(list(study.design.axes))
    return [f"axis_{names[axis]}" for axis in study.design.axes]


def incomparable(study: Study) -> str | None:
    """A warning where the losses of the runs are over different things, so that their order says
    nothing.

    None where they compare.
    """
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


def write_report(study: Study) -> dict[str, Path]:
    """Writes the table, the ranking and the pictures; each replaces the one of an earlier report,
    whole.
    """
    rows, ranked = point_rows(study), ranking(study)
    kind, output = study.design.kind, study.output
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["point"])
    writer.writeheader()
    writer.writerows(rows)
    paths = {"csv": output / f"{kind}_results.csv", "markdown": output / "report.md"}
    write_synced(paths["csv"], text.getvalue().encode())
    write_synced(paths["markdown"], markdown(study, rows, ranked).encode())
    if ranked:
        drawn = {
            "params_vs_perplexity": draw_sizes(ranked, "parameters_total", "parameters"),
            "active_ratio_vs_perplexity": draw_sizes(
                ranked, "active_share", "active / all parameters"
            ),
            "axes_vs_perplexity": draw_axes(
                finished_groups(study), study.design.parsed_axes(), study.design.search == "each"
            ),
        }
        for name, picture in drawn.items():
            paths[name] = output / f"{name}.png"
            write_synced(paths[name], picture)
    return paths


def _loss_text(entry: dict[str, Any]) -> str:
    spread = "" if entry["spread"] is None else f" ± {entry['spread']:.4f}"
    return f"{entry['validation_loss']:.4f}{spread}"


def _runs_text(entry: dict[str, Any]) -> str:
    return (
        str(entry["seeds"])
        if entry["seeds"] == entry["seeds_asked"]
        else f"{entry['seeds']} of {entry['seeds_asked']}"
    )


def _point_text(entry: dict[str, Any]) -> str:
    """The point's name, with its values where the name does not tell them."""
    names = short_names(list(entry["values"]))
    text: str = entry["point"]
    if text.startswith(TRIAL):
        text += (
            f" ({', '.join(f'{names[axis]}={value}' for axis, value in entry['values'].items())})"
        )
    return text + (f" (also {', '.join(entry['also'])})" if entry["also"] else "")


def _cells(entry: dict[str, Any]) -> list[str]:
    return [
        str(entry["rank"]),
        _point_text(entry),
        f"{entry['perplexity']:.4g}",
        _loss_text(entry),
        _runs_text(entry),
        f"{entry['parameters_total']:,}",
        f"{entry['parameters_active']:,}",
        f"{entry['active_share']:.1%}",
        f"{entry['tokens_per_second']:,.0f}",
    ]


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


def terminal_table(study: Study, ranked: list[dict[str, Any]]) -> Table:
    more = f", the best {SHOWN_ROWS} of {len(ranked)}" if len(ranked) > SHOWN_ROWS else ""
    table = Table(*COLUMNS, title=f"{study.design.kind} of {study.design.recipe}{more}")
    for entry in ranked[:SHOWN_ROWS]:
        table.add_row(*(_escaped(cell) for cell in _cells(entry)))
    return table


def _escaped(cell: str) -> str:
    return cell.replace("[", "\\[")


def _markdown_table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def markdown(study: Study, rows: list[dict[str, Any]], ranked: list[dict[str, Any]]) -> str:
    """The report to read and to hand on."""
    design, tokens = study.design, sorted({entry["train_tokens"] for entry in ranked})
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states(study).items()))
    parts = [
        f"# {design.kind.capitalize()} of {design.recipe}",
        (
            f"{len(study.points)} points, {len(study.runs)} runs ({counts}); search"
            f" {design.search}, {design.ranks} ranks a"
            f" run{', ' + ' or '.join(f'{count:,}' for count in tokens) + ' tokens a run' if tokens else ''}."
            " Losses are nats a token over the whole validation"
            f" split{', mean ± standard deviation over seeds' if design.seeds else ''}."
        ),
    ]
    if note := incomparable(study):
        parts.append(f"**Warning:** {note}.")
    if ranked:
        best = ranked[0]
        command = [
            "python",
            shown(LAUNCHERS / "pretrain.py"),
            "--recipe",
            design.recipe,
            *(part for one in best["overrides"] for part in ("--set", one)),
            *plugin_arguments(),
        ]
        parts += ["## Ranking", _markdown_table(COLUMNS, [_cells(entry) for entry in ranked])]
        parts += [
            f"The best one: `{shlex.join(command)}` and what else this sweep was started with."
        ]
    if design.search == "each":
        parts += _axis_sections(study)
    troubles = [
        row
        for row in rows
        if row["state"] in ("failed", "refused", "pruned", "interrupted", "running", "waiting")
        and row["run"] == row["point"]
    ]
    left_out = [[entry["name"], "left out", "", entry["reason"]] for entry in study.skipped]
    if troubles or left_out:
        told = [
            [
                row["point"],
                row["state"],
                "" if row["exit_code"] is None else str(row["exit_code"]),
                row["error"] or "",
            ]
            for row in troubles
        ]
        parts += [
            "## Not finished",
            _markdown_table(("point", "state", "exit code", "why"), told + left_out),
        ]
    if ranked:
        names = ("params_vs_perplexity", "active_ratio_vs_perplexity", "axes_vs_perplexity")
        parts += ["## Pictures", *(f"![{name}]({name}.png)" for name in names)]
    return "\n\n".join(parts) + "\n"


def _axis_sections(study: Study) -> list[str]:
    """For one axis at a time: each value beside the base recipe."""
    groups = finished_groups(study)
    base = next((entry for entry in groups if entry["point"] == BASE), None)
    parts = []
    for axis in study.design.parsed_axes():
        entries = [entry for entry in groups if entry["values"].get(axis.name) is not None]
        if not entries:
            continue
        order = {option.label: index for index, option in enumerate(axis.options)}
        entries.sort(key=lambda entry: order[entry["values"][axis.name]])
        lines = [
            [
                entry["values"][axis.name],
                f"{entry['perplexity']:.4g}",
                _loss_text(entry),
                _runs_text(entry),
                (
                    ""
                    if base is None
                    else f"{entry['validation_loss'] - base['validation_loss']:+.4f}"
                ),
                f"{entry['parameters_total']:,}",
                f"{entry['active_share']:.1%}",
            ]
            for entry in entries
        ]
        parts += [
            f"## {axis.name}",
            _markdown_table(
                (
                    axis.name,
                    "perplexity",
                    "validation loss",
                    "runs",
                    "against base",
                    "parameters",
                    "share",
                ),
                lines,
            ),
        ]
    return parts
