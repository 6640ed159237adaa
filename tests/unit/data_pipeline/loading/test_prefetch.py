"""A batch that does not come is reported while training waits, and ends the run if the recipe says
so.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import pytest

from data_pipeline.loading.prefetch import PrefetchWait
from pretrain.core.errors import DataError


def slow(seconds: float) -> Future[int]:
    return ThreadPoolExecutor(1).submit(lambda: time.sleep(seconds) or 7)


def test_a_wait_is_told_at_the_limit_and_each_time_it_has_doubled() -> None:
    told: list[tuple[float, str]] = []
    prefetch_wait = PrefetchWait()
    prefetch_wait.reading = "sample 3 of the source 'web'"
    assert prefetch_wait.result(slow(0.0)) == 7
    prefetch_wait.watch(0.1, None, lambda seconds, reading: told.append((seconds, reading)))
    assert prefetch_wait.result(slow(0.0)) == 7 and told == []
    assert prefetch_wait.result(slow(0.5)) == 7
    assert (
        1 <= len(told) <= 3 and told[0][0] >= 0.1 and told[0][1] == "sample 3 of the source 'web'"
    )
    assert all(later[0] >= 2 * earlier[0] - 0.3 for earlier, later in pairwise(told))
    assert prefetch_wait.seconds >= 0.5


def test_a_wait_without_end_ends_the_run_and_names_what_was_read() -> None:
    prefetch_wait = PrefetchWait()
    prefetch_wait.reading = "sample 3 of the source 'web'"
    prefetch_wait.watch(
        60.0,
        0.1,
        lambda seconds, reading: pytest.fail("told"),
    )
    with pytest.raises(
        DataError,
        match=(
            r"has not come for 0 seconds while reading sample 3 of the source"
            r" 'web'.*guards\.stalled_data\.stop_seconds"
        ),
    ):
        prefetch_wait.result(slow(1.0))


def test_an_error_of_the_reader_is_passed_on_a_timeout_too() -> None:
    prefetch_wait = PrefetchWait()
    prefetch_wait.watch(60.0, None, lambda seconds, reading: None)
    for error in (TimeoutError("of the storage"), DataError("damaged")):
        failed: Future[int] = Future()
        failed.set_exception(error)
        with pytest.raises(type(error), match=str(error)):
            prefetch_wait.result(failed)
