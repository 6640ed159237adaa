"""A rank that is slowed down while it works is named; two equal ranks are not."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from tests.support.paths import LAUNCHERS
from tests.support.tiny_run import Started, Tiny, wait_for_step

# For three quarters of the time.
STOPPED_SECONDS = 0.03
RUNNING_SECONDS = 0.01


def slow_down(process: psutil.Process, until: threading.Event) -> None:
    """Stops and continues a process again and again, as a machine that is short of cores does."""
    while not until.is_set():
        process.suspend()
        time.sleep(STOPPED_SECONDS)
        process.resume()
        time.sleep(RUNNING_SECONDS)


def test_the_slowed_one_of_two_ranks_is_named(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    quiet = ("checkpoint.interval_steps=100", "validation.interval_steps=100")
    arguments = tiny.arguments(run, "parallel.ep_size=2", *quiet, steps=60)
    started = Started([LAUNCHERS / "run_deepspeed.sh", *arguments], tmp_path)
    wait_for_step(run, 31, started)
    ended = threading.Event()
    slower = threading.Thread(target=slow_down, args=(started.rank(1), ended))
    slower.start()
    wait_for_step(run, 51, started)
    ended.set()
    slower.join()
    assert started.wait() == 0, started.stderr

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timing: dict[int, dict[str, Any]] = {
        line["step"]: line for line in lines if line["kind"] == "timing"
    }
    measured = {step: line["rank_seconds"] for step, line in timing.items()}
    # The first ten steps hold what each rank allocates and compiles once.
    assert [timing[step]["slow_ranks"] for step in (20, 30)] == [{}, {}], measured
    assert timing[50]["slow_ranks"].keys() == {"1"}, measured
    factor = timing[50]["slow_ranks"]["1"]
    assert factor == timing[50]["slowest_over_median"] > 1.5
    log = (run / "log.txt").read_text()
    assert f"rank 1 (host {socket.gethostname()}) takes {factor:.1f} times the median" in log
    assert "rank 0 (host" not in log
