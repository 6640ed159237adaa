"""A run's folder: one writer at a time, its log file, its summary, whether it may be resumed."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pretrain.callbacks.build import RUN_FILES, TRACKER_FOLDERS
from pretrain.checkpoint.initialize_from import REPORT as INITIAL_WEIGHTS
from pretrain.checkpoint.layout import complete_checkpoints
from pretrain.config.load import recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Phase, Timeline
from pretrain.core.errors import ConfigError
from pretrain.core.files import only_writer

logger = logging.getLogger(__name__)

# What makes a run this run: a change of any of these would continue another model, or on another
# order of data.
FIXED_FIELDS = (
    "seed",
    "model",
    "data.document_mask",
    "data.packing",
    "data.streaming",
    "train.sequence_length",
    "train.micro_batch_size",
    "train.global_batch_size",
    "optimizer.kind",
    "train.precision",
)
# What phases change of a recipe ...
CHANGED_BY_PHASES = (
    "model",
    "train.sequence_length",
    "train.micro_batch_size",
    "train.global_batch_size",
    "data.mixture",
)
# ... and what they have of their own.
OWN_FIELDS = ("schedule", "frozen")
# In summary.json: the last step of a run whose end was reported to all who wait for it, such as
# trackers.
ENDED = "ended_at_step"
CHECKPOINTS = "checkpoints"
LOG = "log.txt"
SUMMARY = "summary.json"
USAGE = "usage"
OTHER_FOLDER = "choose another folder with --set run_path=FOLDER"
WAYS_OUT = f"{OTHER_FOLDER}, or start over with --fresh --overwrite"


@contextlib.contextmanager
def owned_folder(recipe: Recipe, is_main: bool, fresh: bool, overwrite: bool) -> Iterator[None]:
    """Hold the run's folder as its only writer, empty if ``fresh``.

    Ranks other than 0 hold nothing.

    Raises:
        ConfigError: if another process writes to it, or as :func:`start_over`.
    """
    if not is_main:
        yield
        return
    folder = Path(recipe.output_path)
    with only_writer(folder, OTHER_FOLDER):
        if fresh:
            start_over(folder, overwrite, recipe)
        yield


def start_over(folder: Path, overwrite: bool, recipe: Recipe) -> None:
    """For --fresh: delete what this program has written to the folder.

    Raises:
        ConfigError: if the folder holds a run and ``overwrite`` is false, or the run is to start
            from what would be deleted.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        newest = complete_checkpoints(folder / CHECKPOINTS)
        what = f"a run (newest checkpoint {newest[0].name})" if newest else "files of a run"
        raise ConfigError(
            f"--fresh would delete {what} in {folder}: add --overwrite, or {OTHER_FOLDER}"
        )
    for field in ("initial_weights", "branch_from"):
        start = getattr(recipe, field)
        if start is not None and Path(start).resolve().is_relative_to(
            (folder / CHECKPOINTS).resolve()
        ):
            raise ConfigError(
                f"--fresh --overwrite would delete {start}, which {field} starts from: "
                f"move it out of the run's folder, or {OTHER_FOLDER}"
            )
    # Only what this program wrote: an export or notes in the same folder are not ours to delete.
    for name in (CHECKPOINTS, USAGE, "tensorboard", *TRACKER_FOLDERS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (
        *RUN_FILES,
        "incidents.jsonl",
        "evaluations.jsonl",
        "evaluation.log",
        INITIAL_WEIGHTS,
        SUMMARY,
        LOG,
    ):
        (folder / name).unlink(missing_ok=True)


def log_to_file(folder: Path, rank: int) -> None:
    """Send every library's log records and warnings to log.txt.

    The terminal keeps progress bar and results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / LOG, encoding="utf-8")
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s [rank {rank}] %(levelname)s %(name)s: %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for chatty in ("matplotlib", "PIL", "urllib3", "h5py"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def log_configuration(recipe: Recipe, ds_config: dict[str, Any]) -> None:
    """Write the resolved recipe and ds_config to the log."""
    logger.info("recipe:\n%s", recipe_to_yaml(recipe))
    logger.info("ds_config: %s", json.dumps(ds_config))


class _LogWriter(io.TextIOBase):
    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                logging.getLogger("stdout").info(line)
        return len(text)


@contextlib.contextmanager
def prints_to_log() -> Iterator[None]:
    """Inside this block plain prints go to log.txt: some of DeepSpeed's messages are such."""
    with contextlib.redirect_stdout(_LogWriter()):
        yield


def read_summary(folder: Path) -> dict[str, Any]:
    """What the run's summary.json says; empty if there is none, or it is torn."""
    path = folder / SUMMARY
    if path.is_file():
        with contextlib.suppress(json.JSONDecodeError):
            return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def update_summary(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Merge ``values`` into the run's summary.json, atomically, and return the whole."""
    path = folder / SUMMARY
    summary = read_summary(folder) | values
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return summary


def _field(recipe: Recipe, dotted: str) -> Any:
    value: Any = recipe.model_dump(mode="json")
    for key in dotted.split("."):
        value = value[key]
    return value


def check_same_run(
    now: Recipe,
    saved: Recipe,
    fingerprint: Mapping[str, Any],
    state: Mapping[str, Any],
    folder: Path,
) -> None:
    """Refuse to resume a checkpoint of another model, tokenizer, order or topology.

    Args:
        now, saved: the recipes of the run as it is to be, and of the checkpoint.
        fingerprint: tokenizer and topology, which ``state`` (of the checkpoint) must have too.

    Raises:
        ConfigError: naming what differs and what to do.
    """
    if difference := past_difference(now, saved, state["step"]):
        raise ConfigError(
            f"{folder} holds a run with another {difference}: put it back, {WAYS_OUT}"
        )
    if difference := fingerprint_difference(fingerprint, state):
        raise ConfigError(
            f"{folder} holds a run with {difference}: "
            f"resume with what it was started with, {WAYS_OUT}"
        )


def check_branch(
    now: Recipe,
    parent: Recipe,
    fingerprint: Mapping[str, Any],
    state: Mapping[str, Any],
    checkpoint: Path,
) -> None:
    """Refuse a checkpoint of another run (``branch_from``) with another past than the recipe's.

    Args:
        parent: the recipe of the other run.
        fingerprint: tokenizer and topology, which ``state`` (of the checkpoint) must have too.

    Raises:
        ConfigError: naming what differs and what to do.
    """
    step = state["step"]
    num_steps = Timeline(now).num_steps
    if difference := past_difference(now, parent, step):
        raise ConfigError(
            f"branch_from: {checkpoint} is of a run with another {difference}: "
            "make the recipe the parent run's up to that step"
        )
    if difference := fingerprint_difference(fingerprint, state):
        raise ConfigError(
            f"branch_from: {checkpoint} is of a run with {difference}: "
            "start the branch as its parent run was"
        )
    if step >= num_steps:
        raise ConfigError(
            f"branch_from: {checkpoint} is at step {step}, and the recipe ends after {num_steps}: "
            "raise train.train_tokens"
        )


def fingerprint_difference(now: Mapping[str, Any], saved: Mapping[str, Any]) -> str | None:
    """What of tokenizer and topology differs from a checkpoint's, in words; None if nothing."""
    for key, value in now.items():
        if saved.get(key) == value:
            continue
        if key == "tokenizer_sha256":
            return "another tokenizer"
        return f"{key} {saved.get(key)}, not {value}"
    return None


def past_difference(now: Recipe, saved: Recipe, step: int) -> str | None:
    """The first field in which two recipes differ about the first ``step`` steps, in words.

    Without phases the mixture may change: the new one holds from here on. A phase says what it was,
    also when it is over. None if nothing differs.
    """
    timelines = Timeline(now), Timeline(saved)
    phases = [phase for timeline in timelines for phase in timeline.stages]
    starts = {0, *(phase.first_step for phase in phases if phase.first_step < step)}
    fields = (*FIXED_FIELDS, "data.mixture") if now.phases or saved.phases else FIXED_FIELDS
    for start in sorted(starts):
        here, before = (timeline.at(start) for timeline in timelines)
        pairs = {
            field: (_field(before.recipe, field), _field(here.recipe, field)) for field in fields
        }
        pairs |= {field: (_own(before, field), _own(here, field)) for field in OWN_FIELDS}
        for field, (old, new) in pairs.items():
            if old != new:
                phase = here.name if field in (*CHANGED_BY_PHASES, *OWN_FIELDS) else ""
                where = f"{field} in the phase '{phase}'" if phase else field
                return f"{where} ({_difference(old, new)})"
    return None


def _own(phase: Phase, field: str) -> Any:
    """A phase's value of one of ``OWN_FIELDS``, as JSON."""
    value = getattr(phase, field)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else list(value or ())


def _difference(before: Any, after: Any, path: str = "") -> str:
    """The first difference of two nested values, as 'path: before -> after'.

    A section's own values come before those of the sections in it, whose defaults may follow from
    them.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        keys = before.keys() | after.keys()
        for key in sorted(keys, key=lambda key: (isinstance(before.get(key), dict), key)):
            if before.get(key) != after.get(key):
                inner = f"{path}.{key}" if path else key
                return _difference(before.get(key), after.get(key), inner)
    return f"{path + ': ' if path else ''}{before} -> {after}"
