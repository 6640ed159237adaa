"""Goodput: which share of the time since a run's first start went into steps that it has kept.

The account is one small file in the run's folder that rank 0 overwrites after every step, so that
it is right after a kill too: the next start compares it with the checkpoint that it resumes from.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from data_pipeline.loading.prefetch import PrefetchWait
from pretrain.core.files import JsonObject
from pretrain.guards.progress import Progress
from pretrain.training.timing import StepTimer

logger = logging.getLogger(__name__)

ACCOUNT = "goodput.json"
# The file has one length, so that each version of it replaces the one before in a single write.
FILE_BYTES = 1024


@dataclass(frozen=True)
class Account:
    """Where the time of a run went, over all its starts, as of ``time``; seconds.

    Attributes:
        first_start: when the process of the first start was created (Unix time).
        time: when the account was written (Unix time).
        starts: of the run.
        step: the last one that is done.
        rolled_back_steps: by guards, as the progress counts them.
        base_seconds: of training that the run has taken over, from another run or from before there
            was an account.
        train_seconds: of the progress: in kept steps and in those that guards rolled back.
        stall_seconds: of the progress: of these, waiting for batches.
        rolled_back_seconds: of the progress: in steps that guards rolled back.
        lost_steps: that were done and not in the checkpoint which the next start resumed from.
        lost_seconds, lost_stall_seconds: what they took, and what they waited for batches.
        saving_seconds: in which training waited for a save.
        validation_seconds: of validation.
        startup_seconds: from the creation of the processes to their first step.
        down_seconds: from the last account of a start to the creation of the next one's process.
    """

    first_start: float
    time: float
    starts: int = 1
    step: int = 0
    rolled_back_steps: int = 0
    base_seconds: float = 0.0
    train_seconds: float = 0.0
    stall_seconds: float = 0.0
    rolled_back_seconds: float = 0.0
    lost_steps: int = 0
    lost_seconds: float = 0.0
    lost_stall_seconds: float = 0.0
    saving_seconds: float = 0.0
    validation_seconds: float = 0.0
    startup_seconds: float = 0.0
    down_seconds: float = 0.0

    def goodput(self) -> JsonObject:
        """Return the sums that records and summary.json hold."""
        elapsed = self.time - self.first_start
        worked = self.train_seconds - self.base_seconds - self.stall_seconds
        productive = worked - self.rolled_back_seconds
        return {
            "goodput": productive / elapsed if elapsed > 0 else 0.0,
            "elapsed_seconds": elapsed,
            "productive_seconds": productive,
            "lost_seconds": self.lost_seconds + self.rolled_back_seconds,
            "lost_steps": self.lost_steps + self.rolled_back_steps,
            "restarts": self.starts - 1,
            "data_stall_seconds": self.stall_seconds + self.lost_stall_seconds,
            "saving_seconds": self.saving_seconds,
            "saving_share": self.saving_seconds / elapsed if elapsed > 0 else 0.0,
            "validation_seconds": self.validation_seconds,
            "startup_seconds": self.startup_seconds,
            "down_seconds": self.down_seconds,
        }

    def with_progress(self, progress: Progress) -> Account:
        """Return it with what a progress counts."""
        return replace(
            self,
            step=progress.step,
            rolled_back_steps=progress.rolled_back_steps,
            train_seconds=progress.train_seconds,
            stall_seconds=progress.stall_seconds,
            rolled_back_seconds=progress.rolled_back_seconds,
        )

    def next_start(self, progress: Progress, created: float) -> Account:
        """Return it for a start that resumes from ``progress``: the rest is lost."""
        # Steps that a guard rolled back after the checkpoint are done again as well.
        undone = self.step + self.rolled_back_steps - progress.step - progress.rolled_back_steps
        stalls = self.stall_seconds - progress.stall_seconds
        seconds = self.train_seconds - progress.train_seconds
        return replace(
            self.with_progress(progress),
            starts=self.starts + 1,
            lost_steps=self.lost_steps + max(0, undone),
            lost_seconds=self.lost_seconds + max(0.0, seconds - stalls),
            lost_stall_seconds=self.lost_stall_seconds + max(0.0, stalls),
            down_seconds=self.down_seconds + max(0.0, created - self.time),
        )


def read_account(folder: Path) -> Account | None:
    """Return the account in a run's folder; None if there is none, or it is damaged."""
    try:
        return Account(**json.loads((folder / ACCOUNT).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        logger.warning("%s is damaged: goodput is counted from now on", folder / ACCOUNT)
        return None


class GoodputMeter:
    """Keeps the account of a run. Ranks other than 0 keep none.

    Args:
        folder: of the run; None on other ranks.
        timer: knows the seconds of saving and validation.
        wait: knows the seconds that training waited for batches.
    """

    def __init__(self, folder: Path | None, timer: StepTimer, wait: PrefetchWait) -> None:
        self._folder = folder
        self._timer = timer
        self._wait = wait
        self._seen_stalls = 0.0
        # As it was when this process started to train; None before.
        self._begun: Account | None = None
        self._account: Account | None = None
        self._descriptor: int | None = None

    def begin(self, progress: Progress) -> None:
        """Count this start, which is about to take its first step."""
        if self._folder is None:
            return
        now = time.time()
        created = psutil.Process().create_time()
        before = read_account(self._folder)
        if before is None:
            account = Account(created, now).with_progress(progress)
            base = account.train_seconds - account.stall_seconds - account.rolled_back_seconds
            account = replace(account, base_seconds=base)
        else:
            account = before.next_start(progress, created)
        startup = account.startup_seconds + max(0.0, now - created)
        self._begun = replace(account, startup_seconds=startup)
        self._descriptor = os.open(self._folder / ACCOUNT, os.O_WRONLY | os.O_CREAT, 0o666)
        self._write(progress)

    def note(self, progress: Progress) -> None:
        """Bring the account up to date after a step or a save."""
        # On every rank: each one has its own progress.
        progress.stall_seconds += self._wait.seconds - self._seen_stalls
        self._seen_stalls = self._wait.seconds
        if self._begun is not None:
            self._write(progress)

    def measure(self) -> JsonObject | None:
        """Return the sums of the newest account; None on other ranks and before there is one."""
        account = self._account
        if account is None and self._folder is not None:
            # A start that had nothing to do: the run's last account stays.
            account = read_account(self._folder)
        return None if account is None else account.goodput()

    def _write(self, progress: Progress) -> None:
        assert self._begun is not None and self._descriptor is not None
        pauses = self._timer.pause_seconds
        self._account = replace(
            self._begun.with_progress(progress),
            time=time.time(),
            saving_seconds=self._begun.saving_seconds + pauses["saving"],
            validation_seconds=self._begun.validation_seconds + pauses["validation"],
        )
        content = json.dumps(asdict(self._account)).encode()
        # Not synced: it outlasts a kill, and a power failure costs a few steps of the account.
        os.pwrite(self._descriptor, content.ljust(FILE_BYTES - 1) + b"\n", 0)
