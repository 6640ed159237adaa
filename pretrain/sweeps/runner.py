"""Runs in parallel on one machine, each resumable.

A killed sweep starts no run twice, and loses nothing that was saved.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType

from pretrain.core.errors import (
    BAD_CHECKPOINT,
    BAD_DATA,
    DONE,
    IO_FAILED,
    NON_FINITE,
    PREEMPTED,
    USAGE,
)
from pretrain.sweeps.axes import Point
from pretrain.sweeps.launch import (
    error_sentence,
    launch_command,
    launch_environment,
    output_path,
    reached_step,
    read_result,
    result_path,
    validations,
)
from pretrain.sweeps.progress import SweepProgress
from pretrain.sweeps.search import should_prune
from pretrain.sweeps.study import SETTLED, Record, RunResult, Study, is_written_to, try_lock

POLL_SECONDS = 0.2
PROGRESS_SECONDS = 1.0
# A run that is asked to stop before it has installed its signal handlers may exit with any code.
# These codes still mean an error of the run itself.
OWN_REASONS = (USAGE, BAD_DATA, BAD_CHECKPOINT, IO_FAILED, NON_FINITE)


@dataclass
class Active:
    """A point that occupies a slot.

    Attributes:
        lock, process: None while a process of an earlier start of the run is still alive.
        printed_before: bytes of the output file that earlier attempts have written.
        pruning: whether the run was asked to end because it is worse than the others.
    """

    record: Record
    slot: int
    lock: int | None = None
    process: subprocess.Popen[bytes] | None = None
    printed_before: int = 0
    pruning: bool = False


class StopRequest:
    """Set by Ctrl-C and SIGTERM; a second one ends the runs without letting them save."""

    def __init__(self) -> None:
        self.count = 0

    def install(self) -> None:
        """Replaces this process's handlers of both signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Only counted: a handler runs between any two instructions, and the loop looks later.
        self.count += 1


class Runner:
    """Works through points, one run at a time in each slot.

    Args:
        devices: the GPUs of each slot; one empty list a slot on CPUs.
        points: returns the next point when a slot is free, None when there are no more.
        keep_going: start other points after a run has failed.
        retry_failed: start failed runs once more.
    """

    def __init__(
        self,
        study: Study,
        devices: list[list[str]],
        points: Callable[[], Point | None],
        stop: StopRequest,
        progress: SweepProgress,
        keep_going: bool = True,
        retry_failed: bool = False,
    ) -> None:
        self.study = study
        self.devices = devices
        self.points = points
        self.stop = stop
        self.progress = progress
        self.keep_going = keep_going
        self.retry_failed = retry_failed
        self.active: list[Active] = []
        self.failed = False
        self._exhausted = False
        self._signals_sent = 0
        self._shown = 0.0

    def run(self) -> bool:
        """Returns true when nothing is left to do, false if it was asked to stop before."""
        while True:
            self._fill_slots()
            for active in list(self.active):
                self._advance(active)
            if not self.active:
                if self._starts_no_more():
                    return not self.stop.count
                continue
            self._hand_on_signals()
            self._show()
            time.sleep(POLL_SECONDS)

    def _starts_no_more(self) -> bool:
        return bool(self.stop.count) or self._exhausted or (self.failed and not self.keep_going)

    def _fill_slots(self) -> None:
        while not self._starts_no_more() and (slot := self._free_slot()) is not None:
            point = self.points()
            if point is None:
                self._exhausted = True
            else:
                self.active.append(Active(Record(point), slot))

    def _free_slot(self) -> int | None:
        taken = {active.slot for active in self.active}
        return next((slot for slot in range(len(self.devices)) if slot not in taken), None)

    def _advance(self, active: Active) -> None:
        if active.process is None:
            self._try_to_start(active)
        elif (code := active.process.poll()) is not None:
            self._finish(active, code)
        elif self.study.design.prune and not active.pruning and not self.stop.count:
            self._prune(active)

    def _try_to_start(self, active: Active) -> None:
        """Starts a run, unless it is settled or a process of an earlier start is still alive."""
        if self.stop.count:
            self._release(active)
            return
        point = active.record.point
        folder = self.study.run_folder(point.run)
        if active.lock is None:
            active.lock = try_lock(self.study.point_folder(point.run))
        # The supervisor of an earlier start holds the first lock, the training itself the second.
        if active.lock is None or is_written_to(folder):
            self.progress.waiting(point, folder)
            return
        # Read again under the lock: another sweep of this folder may have settled it.
        active.record = self.study.record(point)
        retry = self.retry_failed and active.record.state == "failed"
        if active.record.state in SETTLED and not retry:
            self._release(active)
        # The sweep may have been killed between the end of the run and its record.
        elif (result := read_result(self.study, point)) is not None:
            self._settle(active, result)
        else:
            self._start(active)

    def _start(self, active: Active) -> None:
        study = self.study
        point = active.record.point
        devices = self.devices[active.slot]
        assert active.lock is not None
        # Otherwise the result of an earlier attempt could be taken for this one's.
        result_path(study, point).unlink(missing_ok=True)
        active.record.state = "running"
        active.record.error = None
        active.record.attempts.append({"started": _now()})
        study.write(active.record)
        with output_path(study, point).open("ab") as output:
            active.printed_before = output.tell()
            active.process = subprocess.Popen(
                launch_command(study, point, devices),
                cwd=study.design.folder,
                env=launch_environment(len(self.devices), study.design.ranks, devices),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C must reach the run through this process alone, so that a second one is
                # known to be a second one.
                start_new_session=True,
                # The supervisor keeps the lock when this process is killed.
                pass_fds=(active.lock,),
            )
        self.progress.started(point)

    def _finish(self, active: Active, code: int) -> None:
        """Records how a process ended: finished, pruned, interrupted or failed."""
        record = active.record
        study = self.study
        record.attempts[-1].update({"ended": _now(), "exit_code": code})
        result = read_result(study, record.point) if code == DONE else None
        if result is not None:
            self._settle(active, result)
            return
        was_asked_to_end = self.stop.count > 0 or active.pruning
        if code == PREEMPTED or (was_asked_to_end and code not in OWN_REASONS):
            record.state = "pruned" if active.pruning else "interrupted"
        else:
            with output_path(study, record.point).open("rb") as output:
                output.seek(active.printed_before)
                record.error = error_sentence(output.read().decode(errors="replace"), code)
            record.state = "failed"
            self.failed = True
        if active.pruning:
            record.validation = validations(study.run_folder(record.point.run))
        study.write(record)
        self._release(active)
        self.progress.ended(record, study.num_steps(record.point))

    def _settle(self, active: Active, result: RunResult) -> None:
        """Records the result of a run that has taken all its steps."""
        record = active.record
        study = self.study
        if record.attempts:
            record.attempts[-1]["resumed_from_step"] = result["resumed_from_step"]
        if result["validation_loss_in_training"] is None:
            record.state = "failed"
            record.error = "the data has no validation split to compare runs by"
            self.failed = True
        else:
            record.state = "finished"
            record.result = result
            record.validation = validations(study.run_folder(record.point.run))
        study.write(record)
        self._release(active)
        self.progress.ended(record, study.num_steps(record.point))

    def _release(self, active: Active) -> None:
        if active.lock is not None:
            os.close(active.lock)
        self.active.remove(active)

    def _prune(self, active: Active) -> None:
        validation = validations(self.study.run_folder(active.record.point.run))
        if len(validation) > len(active.record.validation):
            active.record.validation = validation
            others = [self.study.record(point) for point in self.study.runs]
            if should_prune(others, validation):
                active.pruning = True
                assert active.process is not None
                active.process.send_signal(signal.SIGTERM)

    def _hand_on_signals(self) -> None:
        """The first request lets the runs save; the second kills them and their children."""
        while self._signals_sent < self.stop.count:
            self._signals_sent += 1
            self.progress.stopping(len(self.active), again=self._signals_sent > 1)
            for active in self.active:
                if active.process is None or active.process.poll() is not None:
                    continue
                if self._signals_sent == 1:
                    active.process.send_signal(signal.SIGTERM)
                else:
                    _kill_all(active.process.pid)

    def _show(self) -> None:
        if time.monotonic() - self._shown >= PROGRESS_SECONDS:
            self._shown = time.monotonic()
            self.progress.show(
                {
                    active.record.point.run: reached_step(
                        self.study.run_folder(active.record.point.run)
                    )
                    for active in self.active
                }
            )


def _kill_all(pid: int) -> None:
    import psutil

    root = psutil.Process(pid)
    # Children first: a dead supervisor's children would have another parent, and be missed.
    for process in [*root.children(recursive=True), root]:
        process.kill()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def listed_points(points: list[Point]) -> Callable[[], Point | None]:
    """A function that returns the next of the given points at each call, None after the last."""
    remaining: Iterator[Point] = iter(points)
    return lambda: next(remaining, None)
