"""Signals at chosen moments: a closed terminal, nohup, and Ctrl-C while a checkpoint is written."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil

from pretrain.core.errors import PREEMPTED
from tests.support.tiny_run import SCRIPT, Started, Tiny, wait_for_step


def command(tiny: Tiny, run: Path) -> list[str]:
    arguments = tiny.arguments(run, "checkpoint.interval_steps=9000", steps=9000)
    return [sys.executable, str(SCRIPT), *arguments]


def saved_step(run: Path) -> int:
    return int((run / "checkpoints" / "latest").read_text().removeprefix("step_"))


def stop_inside_save(process: psutil.Process, run: Path) -> None:
    """Stops the process as soon as it has begun to write a checkpoint."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if list((run / "checkpoints").glob(".step_*.tmp")):
            process.suspend()
            assert list((run / "checkpoints").glob(".step_*.tmp")), "the save was over already"
            return
    raise AssertionError("nothing was saved")


def test_nohup_is_respected_and_ctrl_c_lets_a_save_finish(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = Started(["nohup", *command(tiny, run)], tmp_path)
    wait_for_step(run, 3, started)
    process = psutil.Process(started.process.pid)
    process.send_signal(signal.SIGHUP)
    wait_for_step(run, 6, started)
    process.send_signal(signal.SIGTERM)
    stop_inside_save(process, run)
    process.send_signal(signal.SIGINT)
    process.resume()
    assert started.wait() == PREEMPTED, started.stderr
    assert saved_step(run) >= 6
    assert not list((run / "checkpoints").glob(".step_*.tmp"))


def test_a_closed_terminal_lets_the_run_save(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    master, slave = pty.openpty()
    # The bar shows nothing in a terminal without columns.
    termios.tcsetwinsize(slave, (24, 120))
    # A session of its own whose terminal this is, as a login has.
    starter = (
        "import fcntl, os, sys, termios\n"
        "os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", starter, *command(tiny, run)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    os.close(slave)
    shown = b""
    deadline = time.monotonic() + 280
    # Read as a terminal does: its buffer would fill up otherwise. The bar shows losses of steps.
    while shown.count(b"loss=") < 3 and time.monotonic() < deadline:
        if select.select([master], [], [], 1.0)[0]:
            shown += os.read(master, 65536)
    # The kernel now sends SIGHUP, and every later write to the terminal fails.
    os.close(master)
    assert process.wait(timeout=180) == PREEMPTED, shown.decode()
    assert saved_step(run) >= 1
