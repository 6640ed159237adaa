"""Runs a launcher, forwards signals to its ranks, and ends with the launcher's exit code.

The ranks save at SIGTERM, SIGINT and SIGUSR1 and end with code 75. The launchers alone lose that:
``deepspeed`` dies of SIGTERM and leaves its ranks running, and ``torchrun`` forwards the signal but
ends with code 1 and a traceback. With ``--parent PID`` before the command, the end of the process
that started this one counts as a SIGTERM too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import psutil

SCRIPT = "pretrain.py"
# Between two looks at the parent.
PARENT_SECONDS = 0.5


def is_rank(process: psutil.Process) -> bool:
    """Whether a process is Python running the training script.

    Launchers carry the script's name too, but only as a later argument.
    """
    try:
        script = next(
            (argument for argument in process.cmdline()[1:] if not argument.startswith("-")), ""
        )
    except psutil.Error:
        return False
    return Path(script).name == SCRIPT


def forward(launcher: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to every rank or, before there are any, to the launcher and its children."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(launcher.pid)
        started = root.children(recursive=True)
        for process in [process for process in started if is_rank(process)] or [*started, root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def wait(launcher: subprocess.Popen[bytes], parent: int | None) -> int:
    """Wait for the launcher, and return its exit code.

    If ``parent`` is gone, the ranks are asked to save and end, once.
    """
    # The kernel gives a process whose parent has ended another one.
    while parent is not None and launcher.poll() is None:
        if os.getppid() != parent:
            forward(launcher, signal.SIGTERM)
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(PARENT_SECONDS)
    return launcher.wait()


def main(command: list[str]) -> int:
    """Run the launcher's command line, and return its exit code as a shell would."""
    parent = None
    if command[:1] == ["--parent"]:
        parent = int(command[1])
        command = command[2:]
    # In another session, because Ctrl-C in a terminal would otherwise reach the launcher and the
    # ranks too: a second Ctrl-C interrupts a rank before it has saved.
    launcher = subprocess.Popen(command, start_new_session=True)

    def handle(number: int, frame: FrameType | None) -> None:
        forward(launcher, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, handle)
    code = wait(launcher, parent)
    # Popen reports the end by signal N as -N, a shell as 128 + N.
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
