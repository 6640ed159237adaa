"""Real sweeps as commands, and what they left behind."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.paths import ROOT
from tests.support.tiny_run import SCRIPT, Started, Tiny, curve

ABLATIONS, SWEEP = ROOT / "tools" / "run_ablations.py", ROOT / "tools" / "sweep.py"
# An axis that changes the recipe and nothing of the numbers: each run beside it is what an
# interrupted one must equal.
SAME_NUMBERS = {"logging.hot_expert_factor": [5.0, 4.0]}


def write_axes(tiny: Tiny, folder: Path, axes: dict[str, Any]) -> Path:
    path = folder / "axes.yaml"
    path.write_text(json.dumps({"base": str(tiny.recipe), "axes": axes}))
    return path


def start(tool: Path, folder: Path, *arguments: str | Path) -> Started:
    return Started([sys.executable, tool, *arguments], folder)


def record(output: Path, run: str) -> dict[str, Any]:
    path = output / "points" / run / "record.json"
    content: dict[str, Any] = (
        json.loads(path.read_text()) if path.is_file() else {"state": "waiting", "attempts": []}
    )
    return content


def steps_of(run: Path) -> list[int]:
    """The training steps in a run's metrics.jsonl, whose last line may be half written."""
    path, rows = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row["step"] for row in rows if row["kind"] == "train"]


def numbers(run: Path) -> list[dict[str, Any]]:
    """What a run computed, without what counts hot experts."""
    return [row for row in curve(run) if row["kind"] != "usage"]


class TwiceAtOnce:
    """Watches that no run's folder has more ranks at work than it should."""

    def __init__(self, output: Path, ranks: int) -> None:
        self.output, self.ranks, self.most = output, ranks, 0

    def look(self) -> None:
        found: dict[int, tuple[int, str]] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                script = next((word for word in words[1:] if not word.startswith("-")), "")
                run = next(
                    (word for word in words if word.startswith(f"run_path={self.output}{os.sep}")),
                    None,
                )
                if (
                    script == str(SCRIPT)
                    and run is not None
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found[process.pid] = (process.ppid(), run)
        # What a rank starts looks like the rank until it has become another program.
        counts = Counter(run for parent, run in found.values() if parent not in found)
        self.most = max([self.most, *counts.values()])
        assert self.most <= self.ranks, counts


def wait_until_reached(
    output: Path, run: str, step: int, started: Started, watch: TwiceAtOnce
) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and started.process.poll() is None:
        watch.look()
        if (steps_of(output / "runs" / run) or [0])[-1] >= step:
            return
        time.sleep(0.3)
    pytest.fail(
        f"{run} did not reach step {step}, exit code {started.process.poll()}:"
        f" {started.process.communicate()}"
    )


def wait_watching(started: Started, watch: TwiceAtOnce) -> int:
    while started.process.poll() is None:
        watch.look()
        time.sleep(0.3)
    return started.wait()


def kill_everything(started: Started) -> None:
    """As a machine that loses power: the tool, supervisors, launchers and ranks at once."""
    for process in started.alive():
        with contextlib.suppress(psutil.Error):
            process.kill()
    started.wait()
