"""What a drill has shown: checks, a JSON report, a table, a plot of both curves."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from pretrain.callbacks.environment import hardware
from pretrain.core.errors import DONE
from pretrain.core.figures import save_figure
from pretrain.soak import observed
from pretrain.soak.drill import SAVE, START, TRAINING, AttemptResult, Drill

# Other topologies add up in another order.
TOPOLOGY_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Check:
    """One thing that must hold.

    Attributes:
        detail: what was seen, or what is wrong.
    """

    name: str
    holds: bool
    detail: str


def checks_of(drill: Drill) -> list[Check]:
    """Every check of a drill that has ended."""
    settings, results = drill.settings, drill.results
    changes = len(set(settings.layouts)) > 1
    reference = observed.curve_of(settings.reference)
    difference = observed.curve_difference(
        reference,
        observed.curve_of(settings.killed),
        TOPOLOGY_TOLERANCE if changes else 0.0,
    )
    how = f"within {TOPOLOGY_TOLERANCE}" if changes else "bit for bit"
    share = drill.kills(SAVE) / max(1, drill.kills())
    last = results[-1]
    # Its exit code, if no kill explains it.
    errors = [result for result in results if result.phase is None and result.code != DONE]
    damaged = [fault for result in results for fault in result.damaged]
    orphans = [line for result in results for line in result.orphans]
    left = observed.listing(settings.killed) ^ observed.listing(settings.reference)
    checks = [
        Check("ended by itself", last.phase is None and last.code == DONE, f"code {last.code}"),
        Check("kills", drill.kills() >= settings.kills, f"{drill.kills()} of {settings.kills}"),
        Check(
            "kills during a save",
            share >= settings.save_share,
            f"{drill.kills(SAVE)}, {share:.0%} of all; at least {settings.save_share:.0%}",
        ),
        Check("the same curve", not difference, difference or f"{len(reference)} records {how}"),
        _lost_steps(results),
        Check("no other error", not errors, _first([f"exit code {e.code}" for e in errors])),
        Check("checkpoints stayed whole", not damaged, _first(damaged)),
        Check("no orphans", not orphans, _first(orphans)),
        Check("no leftovers", not left, _first(sorted(left))),
    ]
    if not changes:
        state = observed.state_of_last(settings.killed)
        expected = observed.state_of_last(settings.reference)
        same = state == expected and bool(state)
        seen = f"{len(expected)} weights and optimizer states"
        checks.append(Check("the same state", same, seen))
    return checks


def _first(faults: list[str]) -> str:
    return f"{len(faults)}, the first one: {faults[0]}" if faults else "none"


def _lost_steps(results: list[AttemptResult]) -> Check:
    faults = []
    for number, result in enumerate(results, start=1):
        published, after = result.published
        if result.resumed is not None and result.resumed != published:
            faults.append(f"start {number} began at {result.resumed} instead of {published}")
        if after < published:
            faults.append(f"start {number} ended with step_{after} after step_{published}")
    return Check("no published step lost", not faults, _first(faults))


def report_of(drill: Drill, checks: list[Check]) -> dict[str, Any]:
    """The JSON report."""
    settings, results = drill.settings, drill.results
    taken = sum(
        max(0, result.reached - result.resumed) for result in results if result.resumed is not None
    )
    starts = [result.start_seconds for result in results if result.start_seconds is not None]
    return {
        "holds": all(check.holds for check in checks),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "recipe": settings.recipe,
        "settings": list(settings.settings),
        "topologies": [str(layout) for layout in settings.layouts],
        "seed": settings.seed,
        "steps": settings.steps,
        "kills": {
            "all": drill.kills(),
            **{phase: drill.kills(phase) for phase in (START, TRAINING, SAVE)},
            "by_victim": _by_victim(results),
        },
        "steps_taken": taken,
        "steps_taken_again": taken - settings.steps,
        "reference_seconds": round(drill.reference_seconds, 1),
        "killed_seconds": round(sum(result.seconds for result in results), 1),
        "start_seconds_median": round(statistics.median(starts), 2) if starts else None,
        "checks": [asdict(check) for check in checks],
        "starts": [asdict(result) for result in results],
    }


def _by_victim(results: list[AttemptResult]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for result in results:
        if result.victim is not None:
            counts[result.victim] = counts.get(result.victim, 0) + 1
    return dict(sorted(counts.items()))


def table_of(report: Mapping[str, Any]) -> Table:
    """The checks as a table."""
    kills = report["kills"]
    table = Table(
        "check",
        "holds",
        "seen",
        title=(
            f"{kills['all']} kills ({kills[START]} in a start, {kills[TRAINING]} in training, "
            f"{kills[SAVE]} in a save) over {report['steps']} steps"
        ),
    )
    for check in report["checks"]:
        table.add_row(check["name"], "yes" if check["holds"] else "NO", check["detail"])
    return table


def draw(drill: Drill, path: Path) -> None:
    """Plot the losses of both runs, and a mark for each kill.

    Raises:
        StorageError: if the file cannot be written.
    """
    import matplotlib

    # Draws into memory: the default backend may ask for a display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    runs = (
        (drill.settings.reference, "uninterrupted", 3.0, "tab:gray"),
        (drill.settings.killed, "killed", 1.0, "tab:blue"),
    )
    losses: dict[int, float] = {}
    for run, label, width, color in runs:
        curve = observed.curve_of(run)
        losses = {key[1]: values["loss"] for key, values in curve.items() if key[0] == "train"}
        steps, values = list(losses), list(losses.values())
        axes.plot(steps, values, label=label, linewidth=width, color=color)
    for phase, marker in ((START, "s"), (TRAINING, "x"), (SAVE, "v")):
        steps = [max(1, result.reached) for result in drill.results if result.phase == phase]
        steps = [step for step in steps if step in losses]
        label = f"{len(steps)} kills in {'a ' if phase != TRAINING else ''}{phase}"
        axes.plot(steps, [losses[step] for step in steps], marker, markersize=5, label=label)
    axes.set(xlabel="step", ylabel="training loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path, option="--output")
