"""The folder of a sweep: what was asked, once and for all, and a record of each run, which only the
process that holds its lock writes.

OUTPUT/
  base.yaml  ds_config.json      what every run is laid over: nothing outside the folder can change
  under a sweep that goes on study.json                     axes, points, seeds, tokens, ranks;
  written last points/<run>/record.json       state, attempts, result     points/<run>/output.txt
  what its launches printed runs/<run>/                    the run itself, as launchers/pretrain.py
  writes it *_results.csv  report.md  *.png
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from pretrain.config.load import (
    apply_override,
    import_plugins,
    read_recipe_file,
    validate_recipe,
)
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Timeline
from pretrain.core.errors import ConfigError, StorageError
from pretrain.core.files import write_synced
from pretrain.core.plugins import trust_remedy, untrusted_plugins
from pretrain.sweeps.axes import Axis, Point, parse_axis

# What may become more in a sweep that is there.
GROWING = ("axes", "seeds", "trials")
STUDY, BASE_RECIPE, DS_CONFIG = "study.json", "base.yaml", "ds_config.json"
TRIAL = "trial_"  # how the names of a search's points begin
State = Literal["waiting", "running", "interrupted", "finished", "pruned", "failed", "refused"]
# Nothing more happens to a run in these states.
SETTLED = ("finished", "pruned", "failed", "refused")


@dataclass
class Record:
    """What is known of one run.

    Attributes:
        attempts: one for each start: when it began and ended, and its exit code; without an end
            where the sweep was killed.
        error: the sentence it failed with.
        result: what training's ``--json`` says of the finished run.
        validation: (step, loss) of a run that was pruned or finished, for the pruning of others.
    """

    point: Point
    state: State = "waiting"
    attempts: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    result: dict[str, Any] | None = None
    validation: list[tuple[int, float]] = field(default_factory=list)

    @property
    def loss(self) -> float | None:
        """The loss over the whole validation split, of a finished run."""
        return (
            self.result["validation_loss_in_training"]
            if self.state == "finished" and self.result
            else None
        )


@dataclass(frozen=True)
class Design:
    """What is asked for: the same again goes on, more of :data:`GROWING` adds runs, anything else
    is another sweep.

    Attributes:
        kind: the command that made it, ``sweep`` or ``ablation``.
        base: the recipe as a mapping, with the user's own overrides, before any point's.
        axes: their specifications by name.
        search: ``each``, ``grid``, ``random`` or ``tpe``.
        trials: points of a random or tpe search.
        folder: the working folder that the recipe's relative paths are seen from.
        prune: whether runs that are worse than the median of the others at the same step are ended
            early.
    """

    kind: str
    recipe: str
    base: dict[str, Any]
    axes: dict[str, Any]
    search: str
    trials: int
    search_seed: int
    seeds: list[int]
    train_tokens: int | None
    ranks: int
    ds_config: dict[str, Any]
    folder: str
    prune: bool = False

    def parsed_axes(self) -> list[Axis]:
        return [parse_axis(name, spec) for name, spec in self.axes.items()]


def base_mapping(recipe: str, overrides: list[str], tokens: int | None) -> dict[str, Any]:
    """The recipe's own mapping, bases resolved, with the user's overrides: what each point's
    overrides are applied to.
    """
    content, _ = read_recipe_file(recipe)
    for override in [*overrides, *([f"train.train_tokens={tokens}"] if tokens is not None else [])]:
        apply_override(content, override)
    import_plugins(content)
    return content


@dataclass
class Study:
    """A sweep's folder and what is in it."""

    output: Path
    design: Design
    points: list[Point]
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def runs(self) -> list[Point]:
        """The points that have a run of their own, in order: what an index of an array of jobs
        counts.
        """
        return [point for point in self.points if point.run == point.name]

    @property
    def base_recipe(self) -> Path:
        return self.output / BASE_RECIPE

    def run_folder(self, run: str) -> Path:
        return self.output / "runs" / run

    def point_folder(self, run: str) -> Path:
        return self.output / "points" / run

    def recipe_of(self, point: Point) -> Recipe:
        """Raises :class:`ConfigError` where a rule refuses the point."""
        content = copy.deepcopy(self.design.base)
        for override in [*point.overrides, f"run_path={self.run_folder(point.run)}"]:
            apply_override(content, override)
        if strange := untrusted_plugins(content):
            raise ConfigError(
                f"{self.output} names the plugin {', '.join(strange)}: {trust_remedy(strange)}"
            )
        return validate_recipe(content, self.design.recipe)

    def num_steps(self, point: Point) -> int:
        """Optimizer steps of the point's run."""
        return Timeline(self.recipe_of(point)).num_steps

    def record(self, point: Point) -> Record:
        """What is on disk of a point's run.

        Raises:
            StorageError: where the file is not one of ours.
        """
        path = self.point_folder(point.run) / "record.json"
        if not path.is_file():
            return Record(point)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = Record(**(content | {"point": Point(**content["point"])}))
        except (ValueError, TypeError, KeyError):
            raise StorageError(
                f"{path} is damaged: delete it, and the run goes on from its checkpoint"
            ) from None
        return found

    def write(self, record: Record) -> None:
        """Puts a record on disk, whole; the caller holds the run's lock."""
        write_synced(self.point_folder(record.point.run) / "record.json", _json(asdict(record)))

    def searched_points(self) -> list[Point]:
        """Of a search that chooses as it goes: the points so far, in order."""
        folders = sorted((self.output / "points").glob(f"{TRIAL}*"))
        return [
            self.record(Point(folder.name, {}, [], run=folder.name)).point
            for folder in folders
            if (folder / "record.json").is_file()
        ]

    def save(self) -> None:
        """Writes the study: from here on the folder holds this sweep, or more of the one that it
        holds.

        Raises:
            ConfigError: where the folder holds something that is no sweep's.
        """
        foreign = (
            [
                path.name
                for path in self.output.iterdir()
                if path.name not in (BASE_RECIPE, DS_CONFIG)
            ]
            if self.output.is_dir()
            else []
        )
        if foreign and STUDY not in foreign:
            raise ConfigError(
                f"{self.output} holds {sorted(foreign)[0]} and no sweep: choose another folder with"
                " --output"
            )
        self.output.mkdir(parents=True, exist_ok=True)
        write_synced(
            self.base_recipe, yaml.safe_dump(self.design.base, sort_keys=False, width=120).encode()
        )
        write_synced(self.output / DS_CONFIG, _json(self.design.ds_config))
        content = {
            "version": 1,
            "design": asdict(self.design),
            "points": [asdict(point) for point in self.points],
            "skipped": self.skipped,
        }
        write_synced(self.output / STUDY, _json(content))


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def open_study(output: Path) -> Study | None:
    """The sweep that a folder holds, None where it holds none.

    Raises:
        ConfigError: where its file is damaged or of another version.
    """
    path = output / STUDY
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        study = Study(
            output,
            Design(**content["design"]),
            [Point(**point) for point in content["points"]],
            content["skipped"],
        )
    except (ValueError, TypeError, KeyError):
        raise ConfigError(
            f"{path} is damaged or of another version: choose another folder with --output"
        ) from None
    if study.design.search == "tpe":
        study.points = study.searched_points()
    return study


def same_design(found: Design, asked: Design, output: Path, grows: bool) -> bool:
    """Whether ``output`` holds just the sweep that is asked for; where it ``grows``, it may hold
    less of it.

    Raises:
        ConfigError: where it holds another one.
    """
    before, now = (json.loads(json.dumps(asdict(design))) for design in (found, asked))
    for name, value in now.items():
        if value != before[name] and not (grows and name in GROWING):
            shown = f" ({before[name]}, not {value})" if len(f"{before[name]}{value}") < 100 else ""
            raise ConfigError(
                f"{output} holds a sweep with another '{name}'{shown}: choose another folder with"
                f" --output, or go on with what is there by giving --output {output} alone"
            )
    return bool(now == before)


def try_lock(folder: Path) -> int | None:
    """A descriptor that holds ``folder``, which is created, against other processes.

    None where another one holds it.

    The lock lasts until the last process that has the descriptor ends: handed to a child, it
    outlives a killed parent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def is_written_to(folder: Path) -> bool:
    """Whether a process holds ``folder`` as its only writer, as every training run does; an absent
    one is not.
    """
    if not folder.is_dir():
        return False
    descriptor = try_lock(folder)
    if descriptor is None:
        return True
    with contextlib.suppress(OSError):
        os.close(descriptor)
    return False
