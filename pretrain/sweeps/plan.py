"""Which points a sweep has, each checked as far as it can be before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.loading.mixture import check_names
from data_pipeline.shards.datasets import Datasets, data_folders, load_datasets
from data_pipeline.shards.manifest import canonical_sha256
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_topology
from pretrain.config.timeline import Timeline
from pretrain.core.errors import ConfigError, DataError, PipelineError
from pretrain.engine.ds_config import zero_stage_of
from pretrain.sweeps.axes import Point, grid, one_at_a_time, with_seeds, without_equal_names
from pretrain.sweeps.search import next_point, random_points
from pretrain.sweeps.study import Design, Record, Study, same_design

# A search gives up after so many proposals a trial that no rule lets pass, or that are the same as
# an earlier one.
PROPOSALS_PER_TRIAL = 10
# Before a search starts, the proposals of so many trials are looked through for one that can run.
TRIALS_CHECKED = 5
REFUSALS_SHOWN = 5


def planned_points(design: Design) -> list[Point]:
    """The points that are known from the start: all, or none yet for a search that chooses as it
    goes.

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
    """The sweep that is asked for, its points all checked; nothing is written yet.

    Args:
        found: what the folder holds. It may be a part of what is asked for: its points stay the
            first ones, with their names and runs.

    Raises:
        ConfigError: where the folder holds another sweep, or a point cannot run.
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
    """Whether a design, and the points that are known of it from the start, have all that the sweep
    that was found has.
    """
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
    """Rules, ranks, data and mixture of a point, before a process is started; data folders are read
    once.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.stage = zero_stage_of(study.design.ds_config, "the ds_config")
        self._corpora: dict[str, Datasets] = {}

    def __call__(self, point: Point) -> Recipe:
        """Raises :class:`PipelineError` where the point cannot run, with the sentence that training
        would end with.
        """
        recipe = self.study.recipe_of(point)
        check_topology(recipe, self.study.design.ranks, self.stage)
        datasets = self._corpora_of(recipe)
        if not datasets.utf8_bytes("validation"):
            raise DataError(
                f"the data in {datasets.place} has no validation split to compare runs by: build it"
                " with data.validation_share above 0"
            )
        if not recipe.data.streaming:
            check_names(recipe.data.mixture, list(datasets.training_shards()))
        return recipe

    def measured_on(self, recipe: Recipe) -> dict[str, str]:
        """What the validation loss of a run of this recipe is taken over: equal for runs whose
        losses compare.
        """
        datasets = self._corpora_of(recipe)
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
            "sequence length": str(Timeline(recipe).phases[-1].recipe.train.sequence_length),
            "document mask": str(recipe.data.document_mask),
        }

    def _corpora_of(self, recipe: Recipe) -> Datasets:
        folders = data_folders(recipe.data, recipe.data_path)
        key = json.dumps(folders, sort_keys=True)
        if key not in self._corpora:
            self._corpora[key] = load_datasets(folders)
        return self._corpora[key]


def check_search(study: Study) -> None:
    """Looks for a point of a tpe search that can run, as the search itself will.

    Raises:
        ConfigError: where there is none among its first proposals, with their reasons; nothing has
            been written then.
    """
    axes, check, design = study.design.parsed_axes(), PointCheck(study), study.design
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
    """The same for recipes that would train the same run."""
    return canonical_sha256(
        {
            key: value
            for key, value in recipe.model_dump(mode="json").items()
            if key not in ("name", "run_path")
        }
    )


def checked_points(
    study: Study, points: Sequence[Point], skip_invalid: bool
) -> tuple[list[Point], list[dict[str, str]]]:
    """The points that can run, equal ones standing for one run; and those that cannot, with the
    reason.

    Raises:
        ConfigError: where a point cannot run and ``skip_invalid`` is false, with a sentence for
            each; nothing has started then.
    """
    check, kept, refused = PointCheck(study), [], []
    runs: dict[str, str] = {}
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
        remedy = "" if skip_invalid else "; mend them, or leave them out with --skip-invalid"
        raise ConfigError(
            f"{len(refused)} of {len(points)} points cannot run, nothing was started:"
            f" {shown}{more}{remedy}"
        )
    return kept, refused


def searching(study: Study, left: Sequence[Point]) -> Callable[[], Point | None]:
    """Hands out the points of a tpe search: first those that are ``left`` of earlier starts, then
    new ones until there are enough trials.

    A run that failed is a trial as well.
    """
    axes, check, design = study.design.parsed_axes(), PointCheck(study), study.design
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
            study.point_folder(record.point.run).mkdir(parents=True, exist_ok=True)
            study.write(record)
            study.points.append(record.point)
            if record.state != "refused":
                fingerprints[digest] = record.point.name
                return record.point
        return None

    return following
