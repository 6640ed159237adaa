"""Feeds an experiment tracker beside the training, which never waits for it and never fails with
it.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from tqdm import tqdm

from pretrain.callbacks.base import Callback, Row
from pretrain.callbacks.events import Events, events_of
from pretrain.core.credentials import redact
from pretrain.core.files import write_synced

logger = logging.getLogger(__name__)

TRACKERS = "trackers.json"
# How long the end of a training waits for what a tracker still has to send. One that is stopped may
# be killed soon.
FINISH_SECONDS, STOP_SECONDS = 120.0, 15.0
Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it starts.

    Attributes:
        folder: of the run; whatever a tracker keeps on disk lies in it.
        config: the resolved recipe.
    """

    folder: Path
    project: str
    name: str
    group: str | None
    tags: Sequence[str]
    config: dict[str, Any]


class Tracker(ABC):
    """One service.

    It may raise anything; it is called by one thread, in the order of the methods.
    """

    kind: ClassVar[str]

    @abstractmethod
    def start(self, run: TrackedRun, run_id: str | None) -> str:
        """Begins, or goes on with the run of this id; returns its id."""

    @abstractmethod
    def log(self, events: Events, step: int) -> None:
        """Values of one step. After a resume, steps may come a second time."""

    @abstractmethod
    def finish(self, status: Status, summary: Row, files: Sequence[Path]) -> None:
        """Ends, with the run's summary (empty where training failed) and files to keep beside it."""

    def abandon(self) -> None:  # noqa: B027
        """Called by another thread where one of the others takes too long: nothing may hold back
        the end of this process.
        """


class Tracking(Callback):
    """Calls a tracker from a thread of its own.

    The first error is told, once, and is the tracker's end.

    The tracker's id of the run is kept in trackers.json, so that a resumed run goes on in the same
    one.

    Args:
        files: names in the run's folder that the tracker keeps when the run ends.
    """

    def __init__(self, tracker: Tracker, run: TrackedRun, files: Sequence[str]) -> None:
        self.tracker, self.run, self.files = tracker, run, files
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failed = threading.Event()
        self._thread = threading.Thread(
            target=self._work, name=f"tracker-{tracker.kind}", daemon=True
        )
        self._step = self._num_steps = 0

    def on_start(self, step: int, num_steps: int) -> None:
        self._step, self._num_steps = step, num_steps
        self._thread.start()
        self._waiting.put(self._start)

    def on_step(self, step: int) -> None:
        self._step = step

    def on_row(self, row: Row) -> None:
        if not self._failed.is_set():
            self._waiting.put(lambda: self.tracker.log(events_of(row), row["step"]))

    def on_early_end(self, step: int) -> None:
        self._num_steps = step

    def on_end(self, summary: Row) -> None:
        self._finish("finished" if self._step == self._num_steps else "stopped", summary)

    def on_failure(self, error: Exception) -> None:
        self._finish("failed", {})

    def _start(self) -> None:
        kind, path = self.tracker.kind, self.run.folder / TRACKERS
        known = self.tracker.start(self.run, _read_ids(path).get(kind))
        with _ids_lock:
            ids = _read_ids(path)
            if ids.get(kind) != known:
                write_synced(path, (json.dumps(ids | {kind: known}, indent=2) + "\n").encode())

    def _finish(self, status: Status, summary: Row) -> None:
        if not self._thread.is_alive():
            return
        files = [
            self.run.folder / name for name in self.files if (self.run.folder / name).is_file()
        ]
        self._waiting.put(lambda: self.tracker.finish(status, summary, files))
        self._waiting.put(None)
        seconds = STOP_SECONDS if status == "stopped" else FINISH_SECONDS
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._failed.set()
            self._tell(f"has not answered for {seconds:.0f} s")
            self.tracker.abandon()

    def _work(self) -> None:
        while (action := self._waiting.get()) is not None:
            try:
                action()
            except BaseException as error:  # of any service, of any kind: some call sys.exit
                if not self._failed.is_set():
                    self._failed.set()
                    self._tell(
                        f"failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
                    )
                return

    def _tell(self, what: str) -> None:
        sentence = (
            f"the tracker {self.tracker.kind} {redact(what)} and gets nothing more; the training is"
            " not touched"
        )
        logger.warning(sentence)
        tqdm.write(f"warning: {sentence}", file=sys.stderr)  # beside the progress bar


_ids_lock = threading.Lock()


def _read_ids(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
