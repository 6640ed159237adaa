"""The main program that ``tools/sweep.py`` and ``tools/run_ablations.py`` share."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pretrain.config.load import apply_override
from pretrain.core.cli import write_json
from pretrain.core.credentials import refuse_credentials
from pretrain.core.errors import DONE, PREEMPTED, USAGE, ConfigError
from pretrain.core.files import JsonObject, only_writer
from pretrain.core.shipped import DEFAULT_DS_CONFIG
from pretrain.engine.ds_config import read_ds_config
from pretrain.sweeps.axes import Point, parse_axis
from pretrain.sweeps.launch import (
    continuing_command,
    reached_step,
    slot_devices,
    visible_gpus,
)
from pretrain.sweeps.plan import REFUSALS_SHOWN, planned_study, searching
from pretrain.sweeps.progress import SweepProgress
from pretrain.sweeps.report import terminal_table, write_report
from pretrain.sweeps.results import GroupResult, incomparable, point_rows, ranking, states
from pretrain.sweeps.runner import Runner, StopRequest, listed_points
from pretrain.sweeps.slurm import write_array
from pretrain.sweeps.study import SETTLED, Design, Study, base_mapping, open_study

# Options that define a sweep: with other values of them it is another sweep.
DESIGN_OPTIONS = (
    "overrides",
    "tokens",
    "seeds",
    "ranks",
    "ds_config",
    "skip_invalid",
    "search",
    "trials",
    "search_seed",
    "prune",
    "mode",
    "custom_datasets",
)


def design_from(
    options: argparse.Namespace,
    kind: str,
    recipe: str,
    axes: Mapping[str, object],
    search: str,
    trials: int = 0,
) -> Design:
    """The sweep that the options describe.

    Raises:
        ConfigError: for sizes below 1, axes of no known form, and credentials.
    """
    for name in ("ranks", "tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ConfigError(f"--{name} {value} must be at least 1")
    for name, spec in axes.items():
        # Credentials are refused because the design is written into the folder in plain text.
        for choice in parse_axis(name, spec).options:
            content: JsonObject = {}
            for override in choice.overrides:
                apply_override(content, override)
            refuse_credentials(content, f"axis {name}")
    return Design(
        kind=kind,
        recipe=recipe,
        base=base_mapping(recipe, options.overrides or [], options.tokens),
        axes={str(name): _plain(spec) for name, spec in axes.items()},
        search=search,
        trials=trials,
        search_seed=getattr(options, "search_seed", None) or 0,
        seeds=options.seeds or [],
        train_tokens=options.tokens,
        ranks=options.ranks or 1,
        ds_config=read_ds_config(options.ds_config or DEFAULT_DS_CONFIG),
        folder=os.getcwd(),
        prune=bool(getattr(options, "prune", None)),
    )


def _plain(spec: object) -> object:
    """The specification as JSON returns it, with the names of values as text."""
    return {str(key): value for key, value in spec.items()} if isinstance(spec, dict) else spec


def run_sweep(options: argparse.Namespace, design: Design | None, tool: Path) -> int:
    """Runs a sweep and reports it; returns the exit code.

    Args:
        design: None if only ``--output`` is given: the folder's own sweep is resumed.
        tool: the command that was started, for job scripts and the hint how to continue.
    """
    if options.slots is not None and options.slots < 1:
        raise ConfigError(f"--slots {options.slots} must be at least 1")
    output = options.output.resolve()
    found = open_study(output)
    if options.resume and found is None:
        raise ConfigError(
            f"--resume: {options.output} holds no sweep to continue: leave --resume out to begin one"
        )
    study = (
        _found_alone(options, found)
        if design is None
        else planned_study(output, design, found, bool(options.skip_invalid))
    )
    if options.dry_run:
        return _list_points(options, study)
    if study is not found:
        if (note := incomparable(study)) is not None:
            print(f"warning: {note}", file=sys.stderr)
        with only_writer(output, "choose another folder with --output"):
            study.save()
    if options.point is not None:
        return _run_one(options, study)
    if options.slurm:
        script = write_array(study, tool, options.slots or len(study.runs))
        _say(options, f"wrote {script}: {len(study.runs)} runs; submit it with sbatch {script}")
        write_json({"script": str(script), "runs": len(study.runs)}, options.json_path)
        return DONE
    if options.report:
        return _report(options, study, interrupted=False)
    with only_writer(output, "choose another folder with --output"):
        return _run_all(options, study, tool)


def _found_alone(options: argparse.Namespace, found: Study | None) -> Study:
    """The sweep that --output alone resumes.

    Raises:
        ConfigError: if there is none, or an option would define a sweep: it would be ignored.
    """
    if found is None:
        raise ConfigError(
            f"{options.output} holds no sweep to resume: say what to vary, see --help"
        )
    for name in DESIGN_OPTIONS:
        if getattr(options, name, None) is not None:
            flag = "--set" if name == "overrides" else f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} defines a sweep, and --output alone resumes the one that is there: give"
                " the whole command again"
            )
    return found


@contextlib.contextmanager
def _working_in(folder: str) -> Iterator[None]:
    """Changes to the folder that the sweep was made in; a recipe's paths are relative to it."""
    if not Path(folder).is_dir():
        raise ConfigError(
            f"the sweep was started in {folder}, which is not there: its recipe's relative paths"
            " start from it; put it back"
        )
    with contextlib.chdir(folder):
        yield


def _run_all(options: argparse.Namespace, study: Study, tool: Path) -> int:
    settled = {point.run for point in study.runs if study.record(point).state in SETTLED}
    if options.retry_failed:
        settled -= {point.run for point in study.runs if study.record(point).state == "failed"}
    todo = [point for point in study.runs if point.run not in settled]
    with _working_in(study.design.folder):
        next_point = searching(study, todo) if study.design.search == "tpe" else listed_points(todo)
        interrupted = not _work(options, study, next_point, study.runs, settled)
    return _report(
        options,
        study,
        interrupted,
        again=continuing_command(options, tool),
    )


def _run_one(options: argparse.Namespace, study: Study) -> int:
    """Runs one point, as a job of an array does.

    It writes no report, as several jobs end at once; the command with --report does.
    """
    if study.design.search == "tpe" or not 0 <= options.point < len(study.runs):
        raise ConfigError(
            f"--point {options.point}: the sweep in {options.output} has runs 0 to"
            f" {len(study.runs) - 1}"
        )
    point = study.runs[options.point]
    with _working_in(study.design.folder):
        if study.record(point).state not in SETTLED or options.retry_failed:
            _work(options, study, listed_points([point]), [point], set())
    record = study.record(point)
    _say(options, f"{record.state} {point.run}{': ' + record.error if record.error else ''}")
    write_json(
        {
            "point": point.name,
            "state": record.state,
            "error": record.error,
            "result": record.result,
        },
        options.json_path,
    )
    return exit_code(study, [point])


def _work(
    options: argparse.Namespace,
    study: Study,
    points: Callable[[], Point | None],
    runs: list[Point],
    settled: set[str],
) -> bool:
    """Runs what is left of ``runs``, in the order of ``points``; false if it was interrupted."""
    slots = 1 if options.point is not None else options.slots
    devices = slot_devices(visible_gpus(), slots, study.design.ranks)
    steps = {point.run: study.num_steps(point) for point in runs}
    reached = {
        run: min(reached_step(study.run_folder(run)), count)
        for run, count in steps.items()
        if run not in settled
    }
    if study.design.search == "tpe":
        # The steps of trials that are not chosen yet are unknown: the mean of the others is shown.
        total_runs = study.design.trials
        total_steps = total_runs * (sum(steps.values()) // len(steps) if steps else 1)
    else:
        total_runs, total_steps = len(steps), sum(steps.values())
    stop = StopRequest()
    stop.install()
    progress = SweepProgress(
        total_runs,
        total_steps,
        {run: count for run, count in steps.items() if run in settled},
        reached,
    )
    try:
        return Runner(
            study, devices, points, stop, progress, options.keep_going, options.retry_failed
        ).run()
    finally:
        progress.close()


def exit_code(study: Study, points: list[Point]) -> int:
    """The exit code of a sweep.

    0 if all runs have finished or were pruned, 2 if a search found no point that can run, the code
    of the first failed run, or 75 if runs are left.
    """
    records = [study.record(point) for point in points]
    if records and all(record.state == "refused" for record in records):
        return USAGE
    for record in records:
        if record.state == "failed":
            # A run can fail with code 0, if its data has no validation split to compare.
            return (record.attempts[-1].get("exit_code") or 1) if record.attempts else 1
    return DONE if all(record.state in SETTLED for record in records) else PREEMPTED


def _report(
    options: argparse.Namespace, study: Study, interrupted: bool, again: Sequence[str] = ()
) -> int:
    """Writes and prints the report; ``again`` is the command that continues the sweep."""
    paths = write_report(study)
    ranked = ranking(study)
    if options.json_path != "-":
        _print_report(study, ranked, paths["markdown"])
        if interrupted:
            _print_plain(f"interrupted: python {shlex.join(again)} continues")
    result = {
        "output": str(study.output),
        "search": study.design.search,
        "runs": len(study.runs),
        "states": states(study),
        "incomparable": incomparable(study),
        "ranking": [entry.to_dict() for entry in ranked],
        "points": [row.to_dict() for row in point_rows(study)],
        "skipped": study.skipped,
        "files": {name: str(path) for name, path in paths.items()},
    }
    write_json(result, options.json_path)
    if options.report:
        return DONE
    return PREEMPTED if interrupted else exit_code(study, study.runs)


def _print_report(study: Study, ranked: list[GroupResult], path: Path) -> None:
    """The ranking, what failed, and where the whole report is, for the terminal."""
    if ranked:
        Console().print(terminal_table(study, ranked))
    records = [study.record(point) for point in study.runs]
    failed = [record for record in records if record.state == "failed"]
    # A search may have hundreds of refused points; all failed runs are worth a line.
    refused = [record for record in records if record.state == "refused"][:REFUSALS_SHOWN]
    for record in [*failed, *refused]:
        Console().print(
            f"{record.state} {record.point.run}: {record.error}", markup=False, highlight=False
        )
    if (note := incomparable(study)) is not None:
        _print_plain(f"warning: {note}")
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states(study).items()))
    _print_plain(f"{counts}; the report is {path}")


def _print_plain(text: str) -> None:
    # Without wrapping: a path or a command that is cut into lines cannot be copied.
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _list_points(options: argparse.Namespace, study: Study) -> int:
    """Prints the points and the fields that they set, for --dry-run."""
    points = study.points
    if options.json_path != "-":
        table = Table(
            "number", "point", "overrides", title=f"{len(points)} points of {study.design.recipe}"
        )
        for number, point in enumerate(points):
            table.add_row(str(number), point.name, " ".join(point.overrides).replace("[", "\\["))
        Console().print(table)
        if (note := incomparable(study)) is not None:
            print(f"warning: {note}")
        for entry in study.skipped:
            print(f"left out {entry['name']}: {entry['reason']}")
    write_json(
        {
            "points": [{"name": point.name, "overrides": point.overrides} for point in points],
            "skipped": study.skipped,
        },
        options.json_path,
    )
    return DONE


def _say(options: argparse.Namespace, text: str) -> None:
    if options.json_path != "-":
        print(text, file=sys.stdout)
