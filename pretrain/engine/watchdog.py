"""Notices ranks that stopped, were lost or hang, and ends this process with exit code 7.

A collective waits in native code, in which Python cannot interrupt it, and the network reports a
silent peer after a quarter of an hour or never. So each rank has two threads. One exchanges
heartbeats over a connection of its own to rank 0's store; its calls may block for ever if that host
is the lost one. The other only reads a clock, and ends the process.

Every rank writes its own heartbeat. Rank 0 reads all of them, and writes a verdict that the others
read: the traffic grows with the number of ranks, not with its square. What ends a job:

* a rank whose heartbeats have ceased for ``timeout_seconds``: stopped, killed, or cut off;
* for the others: no reply from rank 0's store for as long;
* no progress on any rank for as long, while no rank is in a pause
  (:class:`pretrain.core.activity.Activity`): one of them is stuck;
* a rank that ended with an error of its own.

Time in which this process itself did not run does not count: a job may be suspended as a whole.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Protocol

from pretrain.core.activity import Activity
from pretrain.engine.stacks import (
    ends_process,
    is_communicating,
    is_compiling,
    main_thread_place,
)

# Other ranks may be about to report the error that ended one of them.
OWN_ERROR_SECONDS = 10.0
# In which a process that has reported its error is gone, and its launcher ends the others.
REPORT_SECONDS = 3.0
# In the verdict on a rank that ended with an error.
BY_ERROR = " ended: "
RUN_AGAIN = "fix what it reports, then run the same command to continue from the last checkpoint"
VERDICT = "verdict"


class Store(Protocol):
    """What is used of torch's stores."""

    def set(self, key: str, value: str) -> None:
        """Write a value."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Read several values."""


@dataclass(frozen=True)
class Beat:
    """One heartbeat.

    Attributes:
        number: of heartbeats so far.
        host: name of the machine.
        phase, count: as in :class:`Activity`.
        paused: whether no progress is expected of the rank.
        place: where the main thread is, if the count has not changed for a while.
        communicates: whether it waits in a collective there.
        left: empty while the rank runs; "done", or the error that it ended with.
    """

    number: int
    host: str
    phase: str
    count: int
    paused: bool
    place: str = ""
    communicates: bool = False
    left: str = ""


@dataclass
class Seen:
    """The newest heartbeat of a rank, as rank 0 saw it; ages are in seconds of its own clock."""

    beat: Beat
    silent: float = 0.0
    since: float = 0.0


def clock_time(seconds_ago: float) -> str:
    """Return the time of day some seconds ago."""
    return f"{datetime.now() - timedelta(seconds=seconds_ago):%H:%M:%S}"


def named(ranks: Sequence[int], seen: Sequence[Seen | None]) -> str:
    """Return "rank 3 (on host b)" or "ranks 3, 4 and 28 more (on host b)"."""
    hosts = sorted({entry.beat.host for rank in ranks if (entry := seen[rank]) is not None})
    listed = ", ".join(str(rank) for rank in ranks[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    where = f" (on host {', '.join(hosts[:4])})" if hosts else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{more}{where}"


class Judge:
    """Rank 0's view of all ranks: feeds on heartbeats, and returns a sentence if the job must end.

    Args:
        limit: seconds of silence, or without progress.
    """

    def __init__(self, world_size: int, limit: float) -> None:
        self.limit = limit
        self.seen: list[Seen | None] = [None] * world_size
        self._without_progress = 0.0

    def hear(self, beats: Sequence[Beat | None], elapsed: float) -> None:
        """Take in one reading of all heartbeats, ``elapsed`` seconds after the last one."""
        moved = False
        for rank, beat in enumerate(beats):
            before = self.seen[rank]
            if beat is None:
                continue
            if before is None or beat.count != before.beat.count or beat.paused:
                moved = True
            if before is None or beat.number != before.beat.number or beat.left:
                self.seen[rank] = Seen(beat)
                if before is not None and beat.left and before.beat.left:
                    self.seen[rank] = Seen(beat, since=before.since + elapsed)
            else:
                before.silent += elapsed
        self._without_progress = 0.0 if moved else self._without_progress + elapsed

    def silent_ranks(self, limit: float) -> list[int]:
        """Return the ranks without a heartbeat for ``limit`` seconds."""
        return [
            rank
            for rank, entry in enumerate(self.seen)
            if entry is not None and not entry.beat.left and entry.silent >= limit
        ]

    def silence(self, limit: float) -> str | None:
        """Return the sentence on silent ranks; None if there are none."""
        ranks = self.silent_ranks(limit)
        if not ranks:
            return None
        longest = max(entry.silent for rank in ranks if (entry := self.seen[rank]) is not None)
        phases = {entry.beat.phase for rank in ranks if (entry := self.seen[rank]) is not None}
        return (
            f"{named(ranks, self.seen)} stopped, ended or cannot be reached since "
            f"{clock_time(longest)} ({longest:.0f} s), last seen in {' and '.join(sorted(phases))}"
        )

    def failure(self, patience: float = OWN_ERROR_SECONDS) -> str | None:
        """Return the sentence on a rank that ended with an error of its own; None if none did.

        Args:
            patience: seconds since then; other ranks may be about to report the same error.
        """
        for rank, entry in enumerate(self.seen):
            if entry is None or entry.beat.left in ("", "done"):
                continue
            if entry.since >= patience:
                return f"{named([rank], self.seen)}{BY_ERROR}{entry.beat.left}"
        return None

    def standstill(self) -> str | None:
        """Return the sentence on ranks that wait for one that does not come; None if they work."""
        running = {
            rank: entry.beat
            for rank, entry in enumerate(self.seen)
            if entry is not None and not entry.beat.left
        }
        if self._without_progress < self.limit or not running:
            return None
        # The others wait for a rank that is behind, or for one that does something else.
        first = min(beat.count for beat in running.values())
        missing = [rank for rank, beat in running.items() if beat.count == first]
        if len(missing) == len(running):
            missing = [rank for rank, beat in running.items() if not beat.communicates]
        since = f"for {self._without_progress:.0f} s, since {clock_time(self._without_progress)}"
        if not missing or len(missing) == len(running):
            phase = next(iter(running.values())).phase
            return (
                f"no rank has made progress {since}: all are in {phase}, and which one holds up "
                "the others is not known"
            )
        beat = running[missing[0]]
        return (
            f"{named(missing, self.seen)} did not arrive where the others wait {since}: "
            f"it is in {beat.phase}{f', at {beat.place}' if beat.place else ''}"
        )

    def verdict(self) -> str | None:
        """Return why the job must end; None if it need not."""
        return self.failure() or self.silence(self.limit) or self.standstill()


class Watchdog:
    """The two threads of one rank.

    Args:
        open_store: connects to the store of rank 0, and returns the connection; may raise.
        limit: seconds of silence after which a rank is lost.
        end: ends the process with a sentence, and does not return; tests pass another function.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        rank: int,
        world_size: int,
        host: str,
        activity: Activity,
        limit: float,
        end: Callable[[str], object] = ends_process,
    ) -> None:
        self._open_store = open_store
        self._rank = rank
        self._host = host
        self._activity = activity
        self._end = end
        self._judge = Judge(world_size, limit)
        self.limit = limit
        self.interval = _interval(limit)
        self._number = 0
        self._left = ""
        self._unanswered = 0.0
        self._answers = 0
        self._verdict: str | None = None
        # Of notes: when it last changed.
        self._count = (-1, 0.0)
        # Only one thread may end the process: the other one waits for ever, that is until the end.
        self._ending = threading.Lock()
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._published = threading.Event()
        self._threads = [
            threading.Thread(target=self._exchange, name="heartbeat", daemon=True),
            threading.Thread(target=self._watch, name="watchdog", daemon=True),
        ]

    def start(self) -> None:
        """Start both threads."""
        for thread in self._threads:
            thread.start()

    def set_limit(self, seconds: float) -> None:
        """Change the limit: that of the connecting, then that of the run."""
        self.limit = seconds
        self._judge.limit = seconds
        self.interval = _interval(seconds)

    def leave(self, how: str = "done") -> None:
        """Stop watching because this rank ends; the others get to know how, if it works at once.

        After a run that is done, rank 0 waits for the others to leave: they need its store.

        Args:
            how: "done", or the sentence of the error.
        """
        self._published.clear()
        self._left = how
        self._wake.set()
        self._published.wait(2 * self.interval + 1.0)
        while how == "done" and self._rank == 0 and self._verdict is None:
            others = [entry for entry in self._judge.seen[1:] if entry is not None]
            if all(entry.beat.left for entry in others):
                break
            time.sleep(0.02)
            self._wake.set()
        self._stopped.set()
        self._wake.set()

    def end_after_loss(self) -> None:
        """End the process after the network has reported that a rank is gone; name that rank.

        Takes a few heartbeats, until it is known who is silent.
        """
        quiet = 3 * self.interval
        deadline = time.monotonic() + 2 * quiet + 2.0
        while time.monotonic() < deadline and self._verdict is None:
            # A rank that reported its own error is the better explanation than its silence.
            sentence = self._judge.failure(0.0)
            if sentence is None and self._rank == 0:
                sentence = self._judge.silence(quiet)
            if sentence is None and self._unanswered >= quiet:
                sentence = self._unreachable()
            if sentence is not None:
                self._decide(sentence)
            time.sleep(self.interval / 4)
        absent = [rank for rank, entry in enumerate(self._judge.seen) if entry is None]
        if self._rank == 0 and absent:
            self._decide(f"{named(absent, self._judge.seen)} did not start or cannot connect")
        self._decide("another rank has ended or cannot be reached")
        self._finish(self._verdict or "")

    def _unreachable(self) -> str:
        return (
            f"rank 0 stopped, ended or cannot be reached since {clock_time(self._unanswered)} "
            f"({self._unanswered:.0f} s)"
        )

    def _decide(self, sentence: str) -> None:
        if self._verdict is None:
            self._verdict = sentence

    def _own_beat(self) -> Beat:
        self._number += 1
        activity = self._activity
        now = time.monotonic()
        if activity.count != self._count[0]:
            self._count = (activity.count, now)
        place = ""
        communicates = False
        if now - self._count[1] > 3 * self.interval:
            place = main_thread_place()
            communicates = is_communicating()
        return Beat(
            self._number,
            self._host,
            activity.phase,
            activity.count,
            not activity.expects_progress or is_compiling(),
            place,
            communicates,
            self._left,
        )

    def _exchange(self) -> None:
        """Write and read heartbeats until the end; a broken connection is opened again."""
        store: Store | None = None
        last = time.monotonic()
        while not self._stopped.is_set():
            try:
                if store is None:
                    store = self._open_store()
                beat = self._own_beat()
                store.set(f"beat/{self._rank}", json.dumps(asdict(beat)))
                if self._verdict is not None and self._rank == 0:
                    store.set(VERDICT, self._verdict)
                self._read(store, time.monotonic() - last)
                last = time.monotonic()
                self._answers += 1
                if beat.left:
                    self._published.set()
            # Whatever the store raises, it means that there was no reply.
            except Exception:
                store = None
            self._wake.wait(self.interval)
            self._wake.clear()

    def _read(self, store: Store, elapsed: float) -> None:
        if self._rank != 0:
            if store.check([VERDICT]):
                self._decide(store.multi_get([VERDICT])[0].decode())
            # Its process may be stopped while the store, in a launcher's process, still replies.
            elif store.check(["beat/0"]):
                self._judge.hear([_read_beat(store.multi_get(["beat/0"])[0])], elapsed)
            return
        keys = [f"beat/{rank}" for rank in range(len(self._judge.seen))]
        if store.check(keys):
            beats: list[Beat | None] = [_read_beat(value) for value in store.multi_get(keys)]
        else:
            # Some ranks have not appeared yet.
            beats = [
                _read_beat(store.multi_get([key])[0]) if store.check([key]) else None
                for key in keys
            ]
        # A long gap is one of this process, not of the others.
        self._judge.hear(beats, min(elapsed, 4 * self.interval))

    def _watch(self) -> None:
        """End the process once there is a verdict, or no reply for too long."""
        answers = 0
        last = time.monotonic()
        while not self._stopped.wait(self.interval / 2):
            now = time.monotonic()
            # This thread did not run either, so neither did the other one.
            elapsed = min(now - last, 4 * self.interval)
            last = now
            self._unanswered = 0.0 if answers != self._answers else self._unanswered + elapsed
            answers = self._answers
            if self._rank == 0:
                if (sentence := self._judge.verdict()) is not None:
                    self._decide(sentence)
            elif self._unanswered >= self.limit:
                self._decide(self._unreachable())
            elif (sentence := self._judge.silence(self.limit + 2 * self.interval)) is not None:
                self._decide(sentence)
            if self._verdict is not None and not self._left:
                self._finish(self._verdict)
                return

    def _finish(self, verdict: str) -> None:
        self._ending.acquire()
        if self._rank == 0:
            self._wake.set()
            # The others read the verdict from the store in this process.
            time.sleep(2 * self.interval)
        if BY_ERROR in verdict:
            # A launcher must see the exit code of the error first, not the 7 of this rank.
            time.sleep(REPORT_SECONDS)
        own = f"rank {self._rank} ends because "
        if verdict.startswith((f"rank {self._rank} ", f"rank {self._rank}:")):
            own = "this rank ends because the others have given it up: "
        self._end(f"{own}{verdict}; {RUN_AGAIN}")


def _interval(limit: float) -> float:
    # Short enough that a lost rank is noticed soon after the limit.
    return min(1.0, max(0.1, limit / 20))


def _read_beat(value: bytes) -> Beat:
    return Beat(**json.loads(value))
