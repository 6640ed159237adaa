"""The folder of a sweep: its design, and a record of each run.

Only the process that holds a run's lock writes its record::

    OUTPUT/
      base.yaml  ds_config.json      what every run starts from, copied when the sweep is made
      study.json                     axes, points, seeds, tokens, ranks; written last
      points/<run>/record.json       state, attempts, result
      points/<run>/output.txt        what its launches printed
      runs/<run>/                    the run itself, as launchers/pretrain.py writes it
      *_results.csv  report.md  *.png
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

import yaml

from pretrain.config.epochs import with_known_length
from pretrain.config.load import (
    apply_override,
    import_plugins,
    read_recipe_file,
    validate_recipe,
)
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Timeline
from pretrain.core.errors import ConfigError, StorageError
from pretrain.core.files import JsonObject, write_synced
from pretrain.core.plugins import trust_remedy, untrusted_plugins
from pretrain.sweeps.axes import Axis, Point, parse_axis

# Fields of a design that an existing sweep may get more of.
GROWING = ("axes", "seeds", "trials")
STUDY = "study.json"
BASE_RECIPE = "base.yaml"
DS_CONFIG = "ds_config.json"
TRIAL = "trial_"  # how the names of a search's points begin
State = Literal["waiting", "running", "interrupted", "finished", "pruned", "failed", "refused"]
# Nothing more happens to a run in these states.
SETTLED = ("finished", "pruned", "failed", "refused")


class Attempt(TypedDict, total=False):
    """One start of a run; without an end if the sweep was killed meanwhile.

    Times are ISO 8601 in UTC. ``resumed_from_step`` is known of runs that have finished.
    """

    started: str
    ended: str
    exit_code: int
    resumed_from_step: int | None


class RunResult(TypedDict):
    """What a sweep reads of the JSON that training writes; the other keys are kept as they are.

    ``validation_loss_in_training`` is in nats a token over the whole validation split, None if the
    data has none.
    """

    validation_loss_in_training: float | None
    parameters_total: int
    parameters_active: int
    train_tokens: int
    steps: int
    tokens_per_second: float | None
    train_seconds: float
    stopped_early: bool
    resumed_from_step: int | None


class SkippedPoint(TypedDict):
    """A point that a rule refuses, left out with ``--skip-invalid``."""

    name: str
    reason: str


@dataclass
class Record:
    """What is known of one run.

    Attributes:
        attempts: one for each start.
        error: the sentence it failed with.
        result: what training's ``--json`` reports of the finished run.
        validation: (step, loss) of a run that was pruned or finished, for the pruning of others.
    """

    point: Point
    state: State = "waiting"
    attempts: list[Attempt] = field(default_factory=list)
    error: str | None = None
    result: RunResult | None = None
    validation: list[tuple[int, float]] = field(default_factory=list)

    @property
    def loss(self) -> float | None:
        """The loss over the whole validation split; None if the run has not finished."""
        if self.state != "finished" or not self.result:
            return None
        return self.result["validation_loss_in_training"]


@dataclass(frozen=True)
class Design:
    """What is asked for.

    The same design again resumes a sweep, one with more of :data:`GROWING` adds runs to it, and
    any other one needs a folder that is not this sweep's.

    Attributes:
        kind: the command that made it, ``sweep`` or ``ablation``.
        base: the recipe as a mapping, with the user's own overrides, before any point's.
        axes: their specifications by name, as the axes file or the command line has them.
        search: ``each``, ``grid``, ``random`` or ``tpe``.
        trials: points of a random or tpe search.
        folder: the working folder that the recipe's relative paths start from.
        prune: whether runs that are worse than the median of the others at the same step are ended
            early.
    """

    kind: str
    recipe: str
    base: JsonObject
    axes: dict[str, object]
    search: str
    trials: int
    search_seed: int
    seeds: list[int]
    train_tokens: int | None
    ranks: int
    ds_config: JsonObject
    folder: str
    prune: bool = False

    def parsed_axes(self) -> list[Axis]:
        """The axes of the design, in order."""
        return [parse_axis(name, spec) for name, spec in self.axes.items()]


def base_mapping(recipe: str, overrides: list[str], tokens: int | None) -> JsonObject:
    """The recipe as a mapping that each point's overrides are applied to.

    Its bases are resolved, and the user's own overrides are applied.
    """
    content, _ = read_recipe_file(recipe)
    for override in overrides:
        apply_override(content, override)
    if tokens is not None:
        apply_override(content, f"train.train_tokens={tokens}")
        # The other way to say how long a run is.
        for other in ("epochs", "epoch_samples"):
            content["train"].pop(other, None)
    import_plugins(content)
    return content


@dataclass
class Study:
    """A sweep's folder and what is in it."""

    output: Path
    design: Design
    points: list[Point]
    skipped: list[SkippedPoint] = field(default_factory=list)

    @property
    def runs(self) -> list[Point]:
        """The points that are trained, in order; an index of an array of jobs counts these.

        A point whose recipe equals that of an earlier point shares the earlier one's run.
        """
        return [point for point in self.points if point.run == point.name]

    @property
    def base_recipe(self) -> Path:
        """The recipe that every run starts from."""
        return self.output / BASE_RECIPE

    def run_folder(self, run: str) -> Path:
        """The folder that training writes to."""
        return self.output / "runs" / run

    def point_folder(self, run: str) -> Path:
        """The folder of a run's record and printed output."""
        return self.output / "points" / run

    def recipe_of(self, point: Point) -> Recipe:
        """The recipe that a point trains; raises :class:`ConfigError` if a rule refuses it."""
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
        return Timeline(with_known_length(self.recipe_of(point))).num_steps

    def record(self, point: Point) -> Record:
        """What is on disk of a point's run.

        Raises:
            StorageError: if the record is damaged.
        """
        path = self.point_folder(point.run) / "record.json"
        if not path.is_file():
            return Record(point)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = Record(**(content | {"point": Point(**content["point"])}))
        except (ValueError, TypeError, KeyError):
            raise StorageError(
                f"{path} is damaged: delete it, and the run resumes from its checkpoint"
            ) from None
        return found

    def write(self, record: Record) -> None:
        """Replaces a record on disk atomically; the caller holds the run's lock."""
        write_synced(self.point_folder(record.point.run) / "record.json", _json(asdict(record)))

    def searched_points(self) -> list[Point]:
        """The points that a tpe search has chosen so far, in order.

        Unlike those of a grid they follow from the results, so the records are their only store.
        """
        folders = sorted((self.output / "points").glob(f"{TRIAL}*"))
        return [
            self.record(Point(folder.name, {}, [], run=folder.name)).point
            for folder in folders
            if (folder / "record.json").is_file()
        ]

    def save(self) -> None:
        """Writes the study; from here on the folder holds this sweep.

        Raises:
            ConfigError: if the folder holds files and no sweep.
        """
        present = {path.name for path in self.output.iterdir()} if self.output.is_dir() else set()
        # A kill between the writes below leaves these two: the next start may replace them.
        foreign = present - {BASE_RECIPE, DS_CONFIG}
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
        # Last: a folder with this file is a whole sweep.
        write_synced(self.output / STUDY, _json(content))


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def open_study(output: Path) -> Study | None:
    """The sweep that a folder holds, or None.

    Raises:
        ConfigError: if its file is damaged or of another version.
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
    """Whether ``output`` holds exactly the sweep that is asked for.

    Args:
        grows: whether it may also hold a part of it; false is returned then.

    Raises:
        ConfigError: if it holds another sweep.
    """
    # Compared as JSON, because the one that was found has been through a file: tuples are lists.
    before, now = (json.loads(json.dumps(asdict(design))) for design in (found, asked))
    for name, value in now.items():
        if value != before[name] and not (grows and name in GROWING):
            shown = f" ({before[name]}, not {value})" if len(f"{before[name]}{value}") < 100 else ""
            raise ConfigError(
                f"{output} holds a sweep with another '{name}'{shown}: choose another folder with"
                f" --output, or continue the one that is there by giving --output {output} alone"
            )
    return bool(now == before)


def try_lock(folder: Path) -> int | None:
    """Creates ``folder`` and locks it against other processes.

    Returns:
        A descriptor that holds the lock; None if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # flock belongs to the open file, not to the process: a child that inherits the descriptor
    # keeps the lock when its parent is killed.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def is_written_to(folder: Path) -> bool:
    """Whether a process holds ``folder`` as its only writer, as every training run does."""
    if not folder.is_dir():
        return False
    descriptor = try_lock(folder)
    if descriptor is None:
        return True
    with contextlib.suppress(OSError):
        os.close(descriptor)
    return False
