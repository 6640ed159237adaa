"""The lines and bars of stages: there from the start, and with the rate of their own stage."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time

import pytest

from pretrain.core import progress
from pretrain.core.progress import Stage, Tally, current_tally, use_tally
from tests.support.paths import ROOT

# A second of steady work after an earlier run's half, in a process whose standard error is a
# terminal.
PROGRAM = """
import time
from pretrain.core.progress import Stage, current_tally
with Stage("encoding", True, 2e6, "B", initial=1_000_000, counts_documents=True) as stage:
    time.sleep(1.2)
    for _ in range(10):
        current_tally().add(100, 50_000)
        stage.advance(50_000)
        time.sleep(0.1)
"""


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(pattern, text)]


def test_elsewhere_than_on_a_terminal_there_are_few_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.3)
    with Stage("encoding", True, 1e6, "B", initial=500_000) as stage:
        for _ in range(10):
            stage.advance(10_000)
            time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "encoding: 1.00MB" and 3 <= len(lines) <= 6
    assert lines[-1].startswith("encoding: done in 00:01")
    # 100,000 bytes in a second: what an earlier run has done is no speed of this one.
    [rate] = numbers(r"([\d.]+)kB/s", lines[-1])
    assert 60 < rate < 110
    assert "\r" not in "".join(lines)


def test_a_stage_that_is_not_shown_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Stage("encoding", False, 10, "B") as stage:
        stage.advance(10)
    assert capsys.readouterr() == ("", "")


def test_the_rate_of_documents_is_that_of_the_present_stage() -> None:
    before = current_tally()
    use_tally(Tally())
    try:
        current_tally().add(1_000_000, 10**9)  # of an earlier stage
        with Stage("encoding", False, counts_documents=True) as stage:
            time.sleep(0.2)
            current_tally().add(50, 20_000)
            documents, _ = numbers(r"([\d,.]+) (?:documents|M chars)/s", stage.rate())
            assert 50 < documents <= 250
    finally:
        use_tally(before)


def test_on_a_terminal_the_bar_is_there_before_anything_is_done_and_its_time_left_fits_its_rate() -> (
    None
):
    controller, terminal = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stderr=terminal) as process:
        os.close(terminal)
        seen, times = b"", []
        while True:
            try:
                part = os.read(controller, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
            times.append(time.monotonic())
    os.close(controller)
    assert process.returncode == 0
    frames = seen.decode().split("\r")
    shown = [frame for frame in frames if "encoding" in frame]
    assert " 50%|" in shown[0] and "documents" not in shown[0]
    assert len(times) >= 4 and times[1] - times[0] < 0.9  # it moves while nothing is finished
    assert " 75%|" in shown[-1]
    rates = numbers(r"([\d,.]+) documents/s", shown[-1])
    assert 300 < rates[0] < 460  # a thousand in 2.2 seconds
