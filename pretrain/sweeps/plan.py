"""Which points a sweep has, each checked as far as it can be before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.loading.mixture import check_names
from data_pipeline.shards.datasets import Datasets, data_folders, load_datasets
from data_pipeline.shards.manifest import canonical_sha256
from pretrain.config.epochs import with_epoch_samples
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_topology
from pretrain.core.errors import ConfigError, DataError, PipelineError
from pretrain.engine.ds_config import zero_stage_of
from pretrain.sweeps.axes import Point, grid, one_at_a_time, with_seeds, without_equal_names
from pretrain.sweeps.search import next_point, random_points
from pretrain.sweeps.study import Design, Record, SkippedPoint, Study, same_design

# A search gives up after this many proposals for each trial: rules may refuse all of them, or they
# repeat earlier points.
PROPOSALS_PER_TRIAL = 10
# Before a search starts, the proposals of this many trials are searched for one that can run.
TRIALS_CHECKED = 5
REFUSALS_SHOWN = 5


def planned_points(design: Design) -> list[Point]:
    """The points that are known from the start: none for a tpe search, all for the others.

    Raises:
        ConfigError: for axes that the search does not take.
    """
    axes = design.parsed_axes()
    if design.search == "tpe":
        if design.seeds:
            raise ConfigError(
                "a tpe search compares single runs and takes no --seeds: use --search grid or"
                " random, or leave --seeds out"
            )
        return []
    if design.search == "random":
        points = random_points(axes, design.trials, design.search_seed)
    else:
        points = grid(axes) if design.search == "grid" else one_at_a_time(axes)
    return with_seeds(without_equal_names(points), design.seeds)


def planned_study(output: Path, design: Design, found: Study | None, skip_invalid: bool) -> Study:
    """The sweep that is asked for, with every point checked; nothing is written yet.

    Args:
        found: the sweep in the folder. It may be a part of ``design``: its points then come first,
            with their names and runs.

    Raises:
        ConfigError: if the folder holds another sweep, or a point cannot run.
    """
    points = planned_points(design)
    if found is not None:
        if same_design(found.design, design, output, grows=_contains(points, design, found)):
            return found
        known = {point.name for point in found.points}
        points = [*found.points, *(point for point in points if point.name not in known)]
    study = Study(output, design, points)
    if design.search == "tpe":
        check_search(study)
    else:
        study.points, study.skipped = checked_points(study, points, skip_invalid)
    return study


def _contains(points: Sequence[Point], design: Design, found: Study) -> bool:
    """Whether a design with these ``points`` includes all of the sweep that was found."""
    if design.search == "tpe":
        before, now = (
            {axis.name: axis for axis in one.parsed_axes()} for one in (found.design, design)
        )
        return (
            design.trials >= found.design.trials
            and before.keys() == now.keys()
            and all(now[name].covers(before[name]) for name in before)
        )
    asked = {point.name: point.overrides for point in points}
    return all(asked.get(point.name) == point.overrides for point in found.points)


class PointCheck:
    """Checks rules, ranks, data and mixture of a point before a process is started.

    Each data folder is read once.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.zero_stage = zero_stage_of(study.design.ds_config, "the ds_config")
        self._datasets: dict[str, Datasets] = {}

    def __call__(self, point: Point) -> Recipe:
        """The point's recipe.

        Raises:
            PipelineError: if the point cannot run, with the sentence that training would end with.
        """
        recipe = self.study.recipe_of(point)
        check_topology(recipe, self.study.design.ranks, self.zero_stage)
        datasets = self._datasets_of(recipe)
        recipe = with_epoch_samples(recipe, datasets)
        if not datasets.utf8_bytes("validation"):
            raise DataError(
                f"the data in {datasets.place} has no validation split to compare runs by: build it"
                " with data.validation_share above 0"
            )
        if not recipe.data.streaming:
            check_names(recipe.data.mixture, list(datasets.training_shards()))
        return recipe

    def measured_on(self, recipe: Recipe) -> dict[str, str]:
        """What the validation loss depends on besides the model; equal if two losses compare."""
        datasets = self._datasets_of(recipe)
        held_out = [
            manifest.splits["validation"]
            for manifest in datasets.manifests.values()
            if "validation" in manifest.splits
        ]
        return {
            "tokenizer": datasets.tokenizer.sha256,
            "validation split": canonical_sha256(
                {
                    "shards": [
                        [shard.bin_sha256, shard.idx_sha256]
                        for split in held_out
                        for shard in split.shards
                    ]
                }
            ),
            "sequence length": str(_last_length(recipe)),
            "document mask": str(recipe.data.document_mask),
        }

    def _datasets_of(self, recipe: Recipe) -> Datasets:
        folders = data_folders(recipe.data, recipe.data_path)
        key = json.dumps(folders, sort_keys=True)
        if key not in self._datasets:
            self._datasets[key] = load_datasets(folders)
        return self._datasets[key]


def _last_length(recipe: Recipe) -> int:
    """The sequence length that the run ends with."""
    last = recipe.phases[-1].sequence_length if recipe.phases else None
    return last or recipe.train.sequence_length


def check_search(study: Study) -> None:
    """Checks that a tpe search will find a point that can run.

    Raises:
        ConfigError: if none of its first proposals can run, with their reasons.
    """
    axes = study.design.parsed_axes()
    check = PointCheck(study)
    design = study.design
    records: list[Record] = []
    while len(records) < PROPOSALS_PER_TRIAL * min(design.trials, TRIALS_CHECKED):
        record = Record(next_point(axes, records, design.search_seed), "refused")
        try:
            check(record.point)
            return
        except PipelineError as error:
            record.error = str(error)
        records.append(record)
    reasons = list(dict.fromkeys(str(record.error) for record in records))[:REFUSALS_SHOWN]
    raise ConfigError(
        f"none of the first {len(records)} points of the search can run, nothing was started:"
        f" {'; '.join(reasons)}"
    )


def fingerprint(recipe: Recipe) -> str:
    """A hash that is equal for recipes that train the same run: all fields but name and folder."""
    return canonical_sha256(
        {
            key: value
            for key, value in recipe.model_dump(mode="json").items()
            if key not in ("name", "run_path")
        }
    )


def checked_points(
    study: Study, points: Sequence[Point], skip_invalid: bool
) -> tuple[list[Point], list[SkippedPoint]]:
    """The points that can run, and those that cannot, with the reason.

    Points of equal recipes get the run of the first of them.

    Raises:
        ConfigError: if a point cannot run and ``skip_invalid`` is false, with a sentence for each.
    """
    check = PointCheck(study)
    kept: list[Point] = []
    refused: list[SkippedPoint] = []
    runs: dict[str, str] = {}  # the first point of each recipe, by the recipe's fingerprint
    for point in points:
        try:
            recipe = check(point)
        except PipelineError as error:
            refused.append({"name": point.name, "reason": str(error)})
            continue
        kept.append(
            replace(
                point,
                run=runs.setdefault(fingerprint(recipe), point.name),
                measured_on=check.measured_on(recipe),
            )
        )
    if refused and (not skip_invalid or not kept):
        shown = "; ".join(
            f"{entry['name']}: {entry['reason']}" for entry in refused[:REFUSALS_SHOWN]
        )
        more = (
            f"; and {len(refused) - REFUSALS_SHOWN} more" if len(refused) > REFUSALS_SHOWN else ""
        )
        remedy = "" if skip_invalid else "; fix them, or leave them out with --skip-invalid"
        raise ConfigError(
            f"{len(refused)} of {len(points)} points cannot run, nothing was started:"
            f" {shown}{more}{remedy}"
        )
    return kept, refused


def searching(study: Study, left: Sequence[Point]) -> Callable[[], Point | None]:
    """A function that returns the next point of a tpe search at each call.

    First come the points that are ``left`` from earlier starts, then new ones until there are
    enough trials. A run that failed counts as a trial.
    """
    axes = study.design.parsed_axes()
    check = PointCheck(study)
    design = study.design
    remaining = iter(left)
    fingerprints = {
        fingerprint(study.recipe_of(point)): point.name
        for point in study.points
        if study.record(point).state != "refused"
    }

    def following() -> Point | None:
        if (point := next(remaining, None)) is not None:
            return point
        while (
            len(fingerprints) < design.trials
            and len(study.points) < design.trials * PROPOSALS_PER_TRIAL
        ):
            records = [study.record(point) for point in study.points]
            record = Record(next_point(axes, records, design.search_seed))
            try:
                recipe = check(record.point)
                digest = fingerprint(recipe)
                if digest in fingerprints:
                    raise ConfigError(f"it is the same recipe as {fingerprints[digest]}")
                record.point = replace(record.point, measured_on=check.measured_on(recipe))
            except PipelineError as error:
                record.state, record.error = "refused", str(error)
            # Refused proposals are recorded too: the sampler would propose them again.
            study.point_folder(record.point.run).mkdir(parents=True, exist_ok=True)
            study.write(record)
            study.points.append(record.point)
            if record.state != "refused":
                fingerprints[digest] = record.point.name
                return record.point
        return None

    return following
