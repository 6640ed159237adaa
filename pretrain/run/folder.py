"""A run's folder: one writer at a time, its log file, its summary."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from pretrain.callbacks.build import RUN_FILES, TRACKER_FOLDERS
from pretrain.checkpoint.initialize_from import REPORT as INITIAL_WEIGHTS
from pretrain.checkpoint.layout import complete_checkpoints
from pretrain.config.load import recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject, only_writer
from pretrain.engine.stacks import write_stacks_to

logger = logging.getLogger(__name__)

# In summary.json: the last step of a run whose callbacks were called at its end, all of them.
ENDED = "ended_at_step"
CHECKPOINTS = "checkpoints"
LOG = "log.txt"
SUMMARY = "summary.json"
USAGE = "usage"
OTHER_FOLDER = "choose another folder with --set run_path=FOLDER"
# Written by parts that are not callbacks.
OTHER_FILES = ("incidents.jsonl", "evaluations.jsonl", "evaluation.log", INITIAL_WEIGHTS)
CHATTY_LIBRARIES = ("matplotlib", "PIL", "urllib3", "h5py")


@contextlib.contextmanager
def owned_folder(recipe: Recipe, is_main: bool, fresh: bool, overwrite: bool) -> Iterator[None]:
    """Hold the run's folder as its only writer; delete the run in it if ``fresh``.

    Ranks other than 0 do nothing.

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
    # A recipe may start from a checkpoint of the very folder that is to be emptied.
    for field in ("initial_weights", "branch_from"):
        start = getattr(recipe, field)
        if start is not None and Path(start).resolve().is_relative_to(
            (folder / CHECKPOINTS).resolve()
        ):
            raise ConfigError(
                f"--fresh --overwrite would delete {start}, which {field} starts from: "
                f"move it out of the run's folder, or {OTHER_FOLDER}"
            )
    # Only what this program wrote: an export or notes in the same folder belong to the user.
    for name in (CHECKPOINTS, USAGE, "tensorboard", *TRACKER_FOLDERS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (*RUN_FILES, *OTHER_FILES, SUMMARY, LOG):
        (folder / name).unlink(missing_ok=True)


def log_to_file(folder: Path, rank: int) -> None:
    """Send every library's log records and warnings to log.txt.

    The terminal stays free for the progress bar and the results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_stacks_to(folder / LOG)
    handler = logging.FileHandler(folder / LOG, encoding="utf-8")
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s [rank {rank}] %(levelname)s %(name)s: %(message)s")
    )
    root = logging.getLogger()
    # In place of the handlers that libraries have added, which would write to the terminal.
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    # Python's warnings, such as torch's deprecations, become log records too.
    logging.captureWarnings(True)
    for library in CHATTY_LIBRARIES:
        logging.getLogger(library).setLevel(logging.WARNING)


def log_configuration(recipe: Recipe, ds_config: JsonObject) -> None:
    """Write the resolved recipe and ds_config to the log."""
    logger.info("recipe:\n%s", recipe_to_yaml(recipe))
    logger.info("ds_config: %s", json.dumps(ds_config))


class _LogWriter(io.TextIOBase):
    """A standard output whose lines become log records."""

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                logging.getLogger("stdout").info(line)
        return len(text)


@contextlib.contextmanager
def prints_to_log() -> Iterator[None]:
    """Inside this block, what is printed goes to log.txt: DeepSpeed prints some messages."""
    with contextlib.redirect_stdout(_LogWriter()):
        yield


def read_summary(folder: Path) -> JsonObject:
    """Return the run's summary.json; empty if there is none, or it is torn."""
    path = folder / SUMMARY
    if path.is_file():
        with contextlib.suppress(json.JSONDecodeError):
            return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def update_summary(folder: Path, values: Mapping[str, object]) -> JsonObject:
    """Merge ``values`` into the run's summary.json, atomically, and return the whole."""
    path = folder / SUMMARY
    summary = {**read_summary(folder), **values}
    # A reader, such as a sweep, must never see half of it.
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return summary
