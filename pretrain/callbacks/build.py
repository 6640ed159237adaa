"""Which callbacks a run has, in their order."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from pretrain.callbacks.base import Callback, CallbackRun
from pretrain.callbacks.card import ModelCard
from pretrain.callbacks.curves import CURVES, TrainingCurves
from pretrain.callbacks.deepspeed_monitor import DeepSpeedMonitor
from pretrain.callbacks.environment import DS_CONFIG, ENVIRONMENT, RECIPE, RunRecord
from pretrain.callbacks.evaluation import ContinuousEvaluation
from pretrain.callbacks.expert_usage import ExpertUsage
from pretrain.callbacks.history import HISTORY, TrainingHistory
from pretrain.callbacks.metrics import METRICS, TRAINING_LOG, MetricsFiles
from pretrain.callbacks.progress import ProgressBar
from pretrain.callbacks.published import PublishedEvents, overlay_of
from pretrain.callbacks.trackers.comet import OFFLINE
from pretrain.callbacks.trackers.mlflow import ARTIFACTS, DATABASE
from pretrain.callbacks.tracking import TRACKERS, TrackedRun, Tracking
from pretrain.checkpoint.layout import CARD
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Timeline
from pretrain.config.trackers import TrackerKind
from pretrain.core.files import JsonObject
from pretrain.core.registry import kinds_by_name
from pretrain.engine.engine import Engine

# What a tracker keeps of a run, and what --fresh deletes.
KEPT_FILES = (CURVES, HISTORY, CARD, ENVIRONMENT, RECIPE, DS_CONFIG)
RUN_FILES = (*KEPT_FILES, METRICS, TRAINING_LOG, TRACKERS, DATABASE)
TRACKER_FOLDERS = ("wandb", ARTIFACTS, OFFLINE)


def make_callbacks(
    recipe: Recipe,
    timeline: Timeline,
    ds_config: JsonObject,
    engine: Engine,
    *,
    validates: bool,
    checkpoints: Path,
    usage: Path,
) -> list[Callback]:
    """Make the callbacks of rank 0.

    Args:
        timeline: of the recipe.
        validates: whether there is a validation split.
        checkpoints, usage: folders of the run.
    """
    folder = Path(recipe.output_path)
    monitor = engine.monitor
    world_size = engine.topology.world_size
    card = ModelCard(folder, checkpoints, recipe)
    overlay = overlay_of(recipe, timeline)
    # Files come before the trackers that keep them.
    callbacks: list[Callback] = [
        RunRecord(folder, recipe, ds_config, world_size),
        MetricsFiles(folder),
        TrainingHistory(folder, validates, timeline),
        ExpertUsage(usage, monitor.summary_writer, recipe.logging.hot_expert_factor),
        DeepSpeedMonitor(monitor),
        ProgressBar(),
        TrainingCurves(folder, overlay),
        card,
    ]
    if overlay is not None:
        callbacks.append(PublishedEvents(overlay, monitor.summary_writer))
    if recipe.evaluation is not None:
        # The end of an evaluation may take long, so a card is there before it, and one with its
        # results after it.
        callbacks += [ContinuousEvaluation(folder, recipe.evaluation), card]
    # Those of plugins come after the files, which they may read.
    run = CallbackRun(folder, recipe, world_size)
    added = [section.implementing_class()(section, run) for section in recipe.callbacks]
    return [*callbacks, *added, *make_trackers(recipe, checkpoints)]


def make_trackers(recipe: Recipe, checkpoints: Path) -> list[Callback]:
    """Make one callback for each of the recipe's trackers whose package is installed."""
    section = recipe.trackers
    if section is None:
        return []
    folder = Path(recipe.output_path)
    run = TrackedRun(
        folder=folder,
        project=section.project or recipe.name,
        name=section.name or folder.resolve().name,
        group=section.group,
        tags=section.tags,
        config=recipe.model_dump(mode="json"),
        hot_factor=recipe.logging.hot_expert_factor,
    )
    kinds = kinds_by_name(TrackerKind)
    return [
        Tracking(kinds[kind].implementing_class()(), run, KEPT_FILES, checkpoints)
        for kind in dict.fromkeys(section.kinds)
        if _is_installed(kinds[kind].module)
    ]


def missing_packages(recipe: Recipe, ds_config: JsonObject) -> list[str]:
    """Return a sentence for each tracker whose package is missing; the run continues without it."""
    kinds = kinds_by_name(TrackerKind)
    wanted = {
        f"trackers.kinds: {kind}": kind
        for kind in (recipe.trackers.kinds if recipe.trackers else ())
    }
    wanted |= {
        f"the ds_config's '{kind}'": kind
        for kind in kinds
        if isinstance(ds_config.get(kind), dict) and ds_config[kind].get("enabled")
    }
    return [
        f"{place} needs a package that is not installed, so this run goes without it: "
        f"pip install {kinds[kind].packages}"
        for place, kind in wanted.items()
        if not _is_installed(kinds[kind].module)
    ]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False
