"""Feeds an experiment tracker in parallel with the training.

Training never waits for a tracker, and never fails with it.
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
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from tqdm import tqdm

from pretrain.analysis.expert_usage import UsageWindow
from pretrain.callbacks.base import Callback, MetricsRecord, Summary
from pretrain.callbacks.events import Events, events_of
from pretrain.callbacks.expert_usage import UsageFigures, usage_figures
from pretrain.callbacks.references import CheckpointReference, CheckpointWatch
from pretrain.core.credentials import redact
from pretrain.core.files import JsonObject, write_synced

logger = logging.getLogger(__name__)

TRACKERS = "trackers.json"
# How long the end of a training waits for what a tracker still has to send. A run that was stopped
# by a signal may be killed soon, so it waits less.
FINISH_SECONDS = 120.0
STOP_SECONDS = 15.0
Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker gets to know of a run when it starts.

    Attributes:
        folder: of the run; whatever a tracker keeps on disk is in it.
        config: the resolved recipe.
        hot_factor: the load that is brightest in pictures of expert usage, in multiples of the
            mean.
    """

    folder: Path
    project: str
    name: str
    group: str | None
    tags: Sequence[str]
    config: JsonObject
    hot_factor: float = 5.0


class Tracker(ABC):
    """One service.

    It may raise anything. One thread calls it, in the order of the methods.
    """

    kind: ClassVar[str]

    @abstractmethod
    def start(self, run: TrackedRun, run_id: str | None) -> str:
        """Begin a run, or continue the one with this id; return its id."""

    @abstractmethod
    def log(self, events: Events, step: int) -> None:
        """Send the values of one step. After a resume, steps may come a second time."""

    def log_usage(self, figures: UsageFigures) -> None:  # noqa: B027 - not all services draw
        """Send the pictures of a window of expert usage."""

    def log_checkpoint(self, checkpoint: CheckpointReference) -> None:  # noqa: B027 - as above
        """Refer to a published checkpoint, which stays where it is.

        A checkpoint comes again if it gets a further name, and after a resume.
        """

    @abstractmethod
    def finish(self, status: Status, summary: Summary, files: Sequence[Path]) -> None:
        """End the run.

        Args:
            summary: of the run; empty if training failed.
            files: to keep with it.
        """

    def abandon(self) -> None:  # noqa: B027 - most services have nothing to do
        """Give up, because a method takes too long: nothing may hold up the end of this process.

        Another thread calls it, while the method still runs.
        """


class Tracking(Callback):
    """Calls a tracker from a thread.

    The first error is reported, once, and ends the tracker. The tracker's id of the run is kept in
    trackers.json, so that a resumed run continues there.

    Args:
        files: names in the run's folder that the tracker keeps when the run ends.
        checkpoints: the folder of those that the tracker refers to.
    """

    def __init__(
        self, tracker: Tracker, run: TrackedRun, files: Sequence[str], checkpoints: Path
    ) -> None:
        self.tracker = tracker
        self.run = run
        self.files = files
        self._checkpoints = CheckpointWatch(checkpoints)
        # None ends the thread.
        self._actions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failed = threading.Event()
        # A daemon: Python's end does not wait for it.
        self._thread = threading.Thread(
            target=self._work, name=f"tracker-{tracker.kind}", daemon=True
        )
        self._step = 0
        self._num_steps = 0

    def on_start(self, step: int, num_steps: int) -> None:
        """Start the thread."""
        self._step = step
        self._num_steps = num_steps
        self._thread.start()
        self._actions.put(self._start)

    def on_step(self, step: int) -> None:
        """Remember the step, and refer to what was saved since the last one."""
        self._step = step
        self._refer()

    def on_usage(self, window: UsageWindow) -> None:
        """Have the window drawn and sent."""
        if not self._failed.is_set():
            # Drawn in the thread: of millions of experts it takes a second.
            self._actions.put(
                lambda: self.tracker.log_usage(usage_figures(window, self.run.hot_factor))
            )

    def on_record(self, record: MetricsRecord) -> None:
        """Have the record sent."""
        if not self._failed.is_set():
            self._actions.put(lambda: self.tracker.log(events_of(record), record["step"]))

    def on_early_end(self, step: int) -> None:
        """Take ``step`` for the last one."""
        self._num_steps = step

    def on_end(self, summary: Summary) -> None:
        """Finish the tracker's run."""
        self._finish("finished" if self._step == self._num_steps else "stopped", summary)

    def on_failure(self, error: Exception) -> None:
        """Finish the tracker's run as a failed one."""
        self._finish("failed", {})

    def _start(self) -> None:
        kind = self.tracker.kind
        path = self.run.folder / TRACKERS
        run_id = self.tracker.start(self.run, _read_ids(path).get(kind))
        # Several trackers start at once, each in its thread, and share the file.
        with _ids_lock:
            ids = _read_ids(path)
            if ids.get(kind) != run_id:
                write_synced(path, (json.dumps(ids | {kind: run_id}, indent=2) + "\n").encode())

    def _refer(self) -> None:
        """Have references to new checkpoints sent."""
        if self._failed.is_set():
            return
        try:
            found = self._checkpoints.new()
        # A tracker never ends a training.
        except OSError as error:
            logger.warning("the tracker %s cannot see checkpoints: %s", self.tracker.kind, error)
            return
        for checkpoint in found:
            # Bound now: the loop's variable has moved on when the thread gets there.
            self._actions.put(partial(self.tracker.log_checkpoint, checkpoint))

    def _finish(self, status: Status, summary: Summary) -> None:
        if not self._thread.is_alive():
            return
        self._refer()
        paths = [self.run.folder / name for name in self.files]
        files = [path for path in paths if path.is_file()]
        # Behind all records that still wait.
        self._actions.put(lambda: self.tracker.finish(status, summary, files))
        self._actions.put(None)
        seconds = STOP_SECONDS if status == "stopped" else FINISH_SECONDS
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._failed.set()
            self._report(f"has not answered for {seconds:.0f} s")
            self.tracker.abandon()

    def _work(self) -> None:
        while (action := self._actions.get()) is not None:
            try:
                action()
            except BaseException as error:  # any error of any service: some call sys.exit
                if not self._failed.is_set():
                    self._failed.set()
                    reason = " ".join(str(error).split())[:200]
                    self._report(f"failed ({type(error).__name__}: {reason})")
                return

    def _report(self, what: str) -> None:
        sentence = (
            f"the tracker {self.tracker.kind} {redact(what)} and gets nothing more; "
            "the training is not touched"
        )
        logger.warning(sentence)
        # tqdm.write keeps the progress bar whole.
        tqdm.write(f"warning: {sentence}", file=sys.stderr)


_ids_lock = threading.Lock()


def _read_ids(path: Path) -> dict[str, str]:
    """Return the run's ids by the kind of tracker."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
