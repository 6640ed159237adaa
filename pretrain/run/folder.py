"""A run's folder: one writer at a time, its log file, its summary."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pretrain.callbacks.build import RUN_FILES, TRACKER_FOLDERS
from pretrain.checkpoint.initialize_from import REPORT as INITIAL_WEIGHTS
from pretrain.checkpoint.layout import (
    LATEST,
    MANIFEST,
    POINTER_NAME,
    SAVED,
    STEP_NAME,
    complete_checkpoints,
    pointers,
)
from pretrain.checkpoint.ledger import LEDGER
from pretrain.config.load import recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.core.credentials import redact
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.files import JsonObject, only_writer, write_synced
from pretrain.core.strict_json import NotAnObject, read_object
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
OTHER_FILES = (
    "incidents.jsonl",
    "evaluations.jsonl",
    "evaluation.log",
    INITIAL_WEIGHTS,
    LEDGER,
    "goodput.json",
    "hardware.json",
)
CHATTY_LIBRARIES = ("matplotlib", "PIL", "urllib3", "h5py")


@contextlib.contextmanager
def owned_folder(recipe: Recipe, is_main: bool, fresh: bool, overwrite: bool) -> Iterator[None]:
    """Hold the run's folder as its only writer; delete the run in it if ``fresh``.

    Ranks other than 0 do nothing.

    Raises:
        ConfigError: if another process writes to it, or as :func:`start_over` and
            :func:`check_checkpoints`.
        CheckpointError: as :func:`check_checkpoints`.
    """
    if not is_main:
        yield
        return
    folder = Path(recipe.output_path)
    with only_writer(folder, OTHER_FOLDER):
        if fresh:
            start_over(folder, overwrite, recipe)
        check_checkpoints(folder, is_branch=recipe.branch_from is not None)
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
    for name in (*RUN_FILES, *OTHER_FILES, SUMMARY, LOG, SAVED):
        (folder / name).unlink(missing_ok=True)


def check_checkpoints(folder: Path, is_branch: bool = False) -> None:
    """Refuse to start a run at step 0 if it had checkpoints that are gone.

    That it had some is certain from any of three signs: the mark ``SAVED``, which the first save
    leaves in the run's folder; a pointer such as ``latest``, or a ``step_N`` folder, which get
    their names only when a checkpoint is whole; and ``summary.json`` of a run that ended or was
    interrupted, which saves before. A run that was killed before its first save has none of them,
    whatever its metrics hold: the same command starts it again.

    Args:
        is_branch: the run starts from a checkpoint of another run. A rollback to it removes all
            checkpoints of this run with their pointers, so that only pointers are a sign.

    Raises:
        ConfigError: if there is a sign and no checkpoint: metrics of the lost steps would go.
        CheckpointError: if what is there is no checkpoint: a folder named ``latest``, a ``step_N``
            folder without a manifest and no other.
    """
    checkpoints = folder / CHECKPOINTS
    # lexists: a link that leads nowhere is there too.
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        raise CheckpointError(f"{checkpoints} is no folder: move it elsewhere")
    entries = sorted(checkpoints.iterdir()) if checkpoints.is_dir() else []
    named = [path for path in entries if POINTER_NAME.match(path.name)]
    for path in named:
        if not path.is_file():
            raise CheckpointError(
                f"{path} is no file that names a checkpoint: move it elsewhere, and run the same "
                "command"
            )
    whole = complete_checkpoints(checkpoints)
    others = [path for path in entries if STEP_NAME.match(path.name) and path not in whole]
    if not whole and others:
        raise CheckpointError(
            f"no checkpoint of this run is whole: {others[-1]} has no {MANIFEST}; put it back, "
            f"{OTHER_FOLDER}, or start over with --fresh --overwrite"
        )
    sign = _sign_of_a_save(folder, named, is_branch)
    if not whole and sign is not None:
        raise ConfigError(
            f"{folder} holds a run whose checkpoints are gone ({sign} shows that it had some), and "
            f"a start at step 0 would overwrite its metrics: put {CHECKPOINTS} back, "
            f"{OTHER_FOLDER}, or start over with --fresh --overwrite"
        )
    for path in others:
        print(f"warning: {path} has no {MANIFEST} and is passed over", file=sys.stderr)
    latest = pointers(checkpoints).get(LATEST)
    if whole and latest is not None and not (checkpoints / latest).exists():
        print(
            f"warning: {checkpoints / LATEST} names {latest}, which is gone; the newest checkpoint "
            f"is {whole[0].name}",
            file=sys.stderr,
        )


def _sign_of_a_save(folder: Path, pointer_files: Sequence[Path], only_pointers: bool) -> str | None:
    """Return the name of what shows that a checkpoint was saved; None if nothing does."""
    if pointer_files:
        return f"{CHECKPOINTS}/{pointer_files[0].name}"
    if only_pointers:
        return None
    if (folder / SAVED).exists():
        return SAVED
    steps = read_summary(folder).get("steps")
    return SUMMARY if isinstance(steps, int) and steps > 0 else None


class _Redacting(logging.Formatter):
    """Keeps credentials out of the log: libraries log addresses and options as they get them."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _LogFile(logging.FileHandler):
    """A log that does not end up on the terminal, as a traceback, if it cannot be written."""

    _is_reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once that the log lacks records; what a run cannot do without fails by itself."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._is_reported:
            self._is_reported = True
            print(f"warning: cannot write {self.baseFilename}: {error.strerror}", file=sys.stderr)


def log_to_file(folder: Path, rank: int) -> None:
    """Send every library's log records and warnings to log.txt.

    The terminal stays free for the progress bar and the results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_stacks_to(folder / LOG)
    handler = _LogFile(folder / LOG, encoding="utf-8")
    handler.setFormatter(
        _Redacting(f"%(asctime)s [rank {rank}] %(levelname)s %(name)s: %(message)s")
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
    try:
        return read_object(folder / SUMMARY, finite=False)
    except NotAnObject:
        return {}


def update_summary(folder: Path, values: Mapping[str, object]) -> JsonObject:
    """Merge ``values`` into the run's summary.json, atomically, and return the whole."""
    path = folder / SUMMARY
    summary = {**read_summary(folder), **values}
    # A reader, such as a sweep, must never see half of it.
    write_synced(path, (json.dumps(summary, indent=2) + "\n").encode())
    return summary
