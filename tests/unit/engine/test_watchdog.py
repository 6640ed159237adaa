"""Watchdogs of several ranks in one process, over a real store: who ends, with which sentence."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from pretrain.core.activity import Activity
from pretrain.engine.topology import free_port
from pretrain.engine.watchdog import Beat, Judge, Store, Watchdog

# Long enough for a machine that is busy with other tests.
LIMIT = 2.0


class Line:
    """A connection to the store that can be cut: calls then wait, as they do without a network."""

    def __init__(self, store: TCPStore) -> None:
        self.store = store
        self.whole = threading.Event()
        self.whole.set()

    def set(self, key: str, value: str) -> None:
        self.whole.wait()
        self.store.set(key, value)

    def check(self, keys: list[str]) -> bool:
        self.whole.wait()
        return bool(self.store.check(keys))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.whole.wait()
        return list(self.store.multi_get(keys))


class Ranks:
    """Watchdogs of ``size`` ranks, with what each was to say at its end."""

    def __init__(self, size: int, limit: float = LIMIT) -> None:
        port = free_port()
        timeout = timedelta(seconds=10)
        server = TCPStore("127.0.0.1", port, is_master=True, timeout=timeout)
        self.lines = [Line(server)]
        for _ in range(size - 1):
            self.lines.append(Line(TCPStore("127.0.0.1", port, timeout=timeout)))
        self.ends: dict[int, str] = {}
        self.activities = [Activity() for _ in range(size)]
        self.dogs = [
            Watchdog(
                self._opener(rank), rank, size, f"host{rank}", activity, limit, self._end(rank)
            )
            for rank, activity in enumerate(self.activities)
        ]
        for dog in self.dogs:
            dog.start()

    def _opener(self, rank: int) -> Callable[[], Store]:
        return lambda: self.lines[rank]

    def _end(self, rank: int) -> Callable[[str], object]:
        return lambda sentence: self.ends.setdefault(rank, sentence)

    def wait(self, ranks: set[int], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while set(self.ends) != ranks and time.monotonic() < deadline:
            time.sleep(0.02)
        assert set(self.ends) == ranks, self.ends

    def close(self) -> None:
        for line in self.lines:
            line.whole.set()
        for dog in self.dogs:
            dog.leave("closed by the test")


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks(3)
    # All have been seen.
    time.sleep(0.4)
    yield made
    made.close()


def test_ranks_that_are_alive_are_left_alone(ranks: Ranks) -> None:
    time.sleep(2 * LIMIT)
    assert ranks.ends == {}


def test_a_rank_that_is_cut_off_is_named_by_the_others_and_names_rank_0(ranks: Ranks) -> None:
    ranks.lines[2].whole.clear()
    began = time.monotonic()
    ranks.wait({0, 1, 2})
    assert time.monotonic() - began < LIMIT + 3
    for rank in (0, 1):
        assert (
            "rank 2 (on host host2) stopped, ended or cannot be reached since" in ranks.ends[rank]
        )
    assert "rank 0 stopped, ended or cannot be reached since" in ranks.ends[2]


def test_the_loss_of_rank_0_ends_the_others(ranks: Ranks) -> None:
    for line in ranks.lines:
        line.whole.clear()
    ranks.wait({1, 2})
    assert all("rank 0 stopped" in sentence for sentence in ranks.ends.values())


def test_a_stuck_rank_is_named_by_all_but_a_pause_may_last(ranks: Ranks) -> None:
    with ranks.activities[0].running(), ranks.activities[1].running():
        with ranks.activities[2].running(), ranks.activities[1].pause("saving"):
            time.sleep(2 * LIMIT)
            assert ranks.ends == {}
        for rank in (0, 2):
            ranks.activities[rank].count += 5
        with ranks.activities[2].running():
            ranks.wait({0, 1, 2})
    assert "rank 1 (on host host1) did not arrive" in ranks.ends[0]
    assert "the others have given it up" in ranks.ends[1]


def test_progress_on_any_rank_is_no_hang(ranks: Ranks) -> None:
    one, two, three = ranks.activities
    with one.running(), two.running(), three.running():
        for _ in range(10):
            time.sleep(LIMIT / 5)
            two.tick()
    assert ranks.ends == {}


def test_ranks_that_are_done_leave_one_by_one_and_rank_0_last(ranks: Ranks) -> None:
    ranks.dogs[1].leave()
    time.sleep(LIMIT + 1)
    left = threading.Thread(target=ranks.dogs[0].leave)
    left.start()
    time.sleep(0.5)
    assert left.is_alive()
    ranks.dogs[2].leave()
    left.join(5)
    assert not left.is_alive() and ranks.ends == {}


def test_the_error_of_a_rank_is_the_reason_of_the_others(ranks: Ranks) -> None:
    ranks.dogs[1].leave("DataError: shard 3 is damaged")
    # As if the network had reported it too.
    threads = [threading.Thread(target=ranks.dogs[rank].end_after_loss) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    ranks.wait({0, 2})
    for rank in (0, 2):
        assert "rank 1 (on host host1) ended: DataError: shard 3" in ranks.ends[rank]


def beat(number: int, **given: object) -> Beat:
    values: dict[str, object] = {"host": "h", "phase": "step 3", "count": 1, "paused": False}
    return Beat(number=number, **(values | given))  # type: ignore[arg-type]


def test_with_equal_counts_the_rank_outside_of_a_collective_is_the_missing_one() -> None:
    judge = Judge(2, 3.0)
    for number in range(5):
        inside = beat(number, communicates=True)
        judge.hear([inside, beat(number, place="kernel.py:7 (wait)")], 1.0)
    sentence = judge.verdict() or ""
    assert "rank 1 (on host h) did not arrive" in sentence
    assert "it is in step 3, at kernel.py:7 (wait)" in sentence


def test_without_a_difference_no_rank_is_blamed() -> None:
    judge = Judge(2, 3.0)
    for number in range(5):
        judge.hear([beat(number, communicates=True)] * 2, 1.0)
    assert "which one holds up the others is not known" in (judge.verdict() or "")


def test_many_silent_ranks_make_one_short_sentence() -> None:
    judge = Judge(64, 3.0)
    judge.hear([beat(0)] * 64, 1.0)
    for number in range(1, 5):
        judge.hear([beat(number), *[beat(0)] * 63], 1.0)
    sentence = judge.verdict() or ""
    assert sentence.startswith("ranks 1, 2, 3, 4, 5, 6, 7, 8 and 55 more (on host h) stopped")


def test_ranks_that_have_not_appeared_yet_are_waited_for() -> None:
    judge = Judge(2, 3.0)
    for number in range(9):
        judge.hear([beat(number, paused=True), None], 1.0)
    assert judge.verdict() is None
