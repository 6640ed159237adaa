"""A run's folder: one writer at a time, its log file, its summary, and whether it may be resumed."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pretrain.callbacks.build import RUN_FILES, TRACKER_FOLDERS
from pretrain.checkpoint.initialize_from import REPORT as INITIAL_WEIGHTS
from pretrain.checkpoint.layout import complete_checkpoints
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Phase, Timeline
from pretrain.core.errors import ConfigError

# What makes a run this run: a change of any of these would continue another model, or on another order of the data.
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
# What phases change of a recipe, and what they have of their own.
CHANGED_BY_PHASES = (
    "model",
    "train.sequence_length",
    "train.micro_batch_size",
    "train.global_batch_size",
    "data.mixture",
)
OWN_FIELDS = ("schedule", "frozen")
# In summary.json: the last step of a run whose end was told to all who wait for it, such as trackers.
ENDED = "ended_at_step"
CHECKPOINTS, LOG, SUMMARY, USAGE = "checkpoints", "log.txt", "summary.json", "usage"


def start_over(folder: Path, overwrite: bool, recipe: Recipe) -> None:
    """For --fresh: an empty folder, or the user's word that what is in it may go.

    Raises:
        ConfigError: where the folder holds a run and ``overwrite`` is false, or the run is to start from what would be deleted.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        newest = complete_checkpoints(folder / CHECKPOINTS)
        what = f"a run (newest checkpoint {newest[0].name})" if newest else "files of a run"
        raise ConfigError(
            f"--fresh would delete {what} in {folder}: add --overwrite, or choose another folder with --set run_path=FOLDER"
        )
    for field in ("initial_weights", "branch_from"):
        start = getattr(recipe, field)
        if start is not None and Path(start).resolve().is_relative_to(
            (folder / CHECKPOINTS).resolve()
        ):
            raise ConfigError(
                f"--fresh --overwrite would delete {start}, which {field} starts from: "
                "move it out of the run's folder, or choose another folder with --set run_path=FOLDER"
            )
    # Only what this program wrote: an export or notes that lie beside it are not ours to delete.
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
    """Sends every library's log records and warnings to log.txt; the terminal keeps the progress bar and the results."""
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


class _LogWriter(io.TextIOBase):
    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                logging.getLogger("stdout").info(line)
        return len(text)


@contextlib.contextmanager
def prints_to_log() -> Iterator[None]:
    """Some of DeepSpeed's messages are plain prints; inside this block they go to log.txt."""
    with contextlib.redirect_stdout(_LogWriter()):
        yield


def read_summary(folder: Path) -> dict[str, Any]:
    """What the run's summary.json says; nothing where there is none."""
    path, summary = folder / SUMMARY, {}
    if path.is_file():
        with contextlib.suppress(json.JSONDecodeError):
            summary = json.loads(path.read_text(encoding="utf-8"))
    return summary


def update_summary(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Merges ``values`` into the run's summary.json, atomically, and returns the whole."""
    path, summary = folder / SUMMARY, read_summary(folder) | values
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
    now_identity: dict[str, Any],
    saved_state: dict[str, Any],
    folder: Path,
) -> None:
    """Refuses to resume a checkpoint of another model, tokenizer, order or topology.

    Raises:
        ConfigError: naming what differs and what to do.
    """
    ways_out = (
        "choose another folder with --set run_path=FOLDER, or start over with --fresh --overwrite"
    )
    if difference := past_difference(now, saved, saved_state["step"]):
        raise ConfigError(
            f"{folder} holds a run with another {difference}: put it back, {ways_out}"
        )
    if difference := identity_difference(now_identity, saved_state):
        raise ConfigError(
            f"{folder} holds a run with {difference}: resume with what it was started with, {ways_out}"
        )


def check_branch(
    now: Recipe, trunk: Recipe, identity: dict[str, Any], state: dict[str, Any], checkpoint: Path
) -> None:
    """Refuses to go on from a checkpoint of another run (``branch_from``) whose past is not the one that the recipe describes.

    Raises:
        ConfigError: naming what differs and what to do.
    """
    step, num_steps = state["step"], Timeline(now).num_steps
    if difference := past_difference(now, trunk, step):
        raise ConfigError(
            f"branch_from: {checkpoint} is of a run with another {difference}: make the recipe the trunk's up to that step"
        )
    if difference := identity_difference(identity, state):
        raise ConfigError(
            f"branch_from: {checkpoint} is of a run with {difference}: start the branch as its trunk was"
        )
    if step >= num_steps:
        raise ConfigError(
            f"branch_from: {checkpoint} is at step {step}, and the recipe ends after {num_steps}: raise train.train_tokens"
        )


def identity_difference(now: dict[str, Any], saved_state: dict[str, Any]) -> str | None:
    """What of tokenizer and topology is another than that of a checkpoint, in words."""
    for key, value in now.items():
        if saved_state.get(key) != value:
            return (
                "another tokenizer"
                if key == "tokenizer_sha256"
                else f"{key} {saved_state.get(key)}, not {value}"
            )
    return None


def past_difference(now: Recipe, saved: Recipe, step: int) -> str | None:
    """The first field in which a recipe differs from that of a run in what its first ``step`` steps were, in words; None where it does not.

    Without phases the mixture may change: the new one holds from here on. A phase says what it was, also when it is over.
    """
    timelines = Timeline(now), Timeline(saved)
    starts = sorted(
        {
            0,
            *(
                stage.first_step
                for timeline in timelines
                for stage in timeline.stages
                if stage.first_step < step
            ),
        }
    )
    for start in starts:
        here, before = (timeline.at(start) for timeline in timelines)
        fields = (*FIXED_FIELDS, "data.mixture") if now.phases or saved.phases else FIXED_FIELDS
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


def _own(stage: Phase, field: str) -> Any:
    value = getattr(stage, field)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else list(value or ())


def _difference(before: Any, after: Any, path: str = "") -> str:
    """The first difference of two nested values, as 'path: before -> after'; a section's own values come before those of the sections in it,
    whose defaults may follow from them."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(
            before.keys() | after.keys(), key=lambda key: (isinstance(before.get(key), dict), key)
        ):
            if before.get(key) != after.get(key):
                return _difference(
                    before.get(key), after.get(key), f"{path}.{key}" if path else key
                )
    return f"{path + ': ' if path else ''}{before} -> {after}"
