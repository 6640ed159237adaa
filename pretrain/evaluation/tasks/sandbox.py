"""Runs a program that a model wrote in a separate process, with limits.

Time, processor time, memory, size of files, number of open files and processes are limited. The
program runs in an empty folder that is deleted afterwards, without this process's environment
variables and, if the system allows it, without a network. This protects against mistakes, not
against malice: the program can read all files that this process can. For programs of an unknown
model use a container or a virtual machine around everything.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Runs in the child, before the program: between fork and exec of a process with threads little is
# safe, so the limits are set by a new interpreter.
_BOOTSTRAP = """\
import ctypes, os, resource, sys
seconds, memory, report, program = *map(int, sys.argv[1:4]), sys.argv[4]
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
try:
    isolated = ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0
except (OSError, AttributeError):
    isolated = False
os.write(report, b"1" if isolated else b"0")
os.close(report)
for limit, value in (
    ("CPU", seconds), ("AS", memory), ("FSIZE", 1 << 20), ("NOFILE", 64), ("NPROC", 64), ("CORE", 0)
):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
os.execv(sys.executable, [sys.executable, "-I", "-S", program])
"""
ERROR_CHARACTERS = 400


@dataclass(frozen=True)
class ProgramRun:
    """How a program ended.

    ``outcome`` is "passed" only if the program ran to its very end; ``error`` is the end of what it
    printed to standard error.
    """

    outcome: Literal["passed", "failed", "timed out"]
    error: str
    without_network: bool


def run_program(
    source: str, timeout_seconds: float = 10.0, memory_bytes: int = 1 << 30
) -> ProgramRun:
    """Runs Python source and kills its process group at the end, or when its time is over.

    A program that leaves early, with whatever exit code, has not passed: its last line has to print
    a number that it cannot know.
    """
    # A program that calls sys.exit(0) before its tests must not pass.
    mark = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder:
        program = Path(folder) / "program.py"
        program.write_text(f"{source}\n\nprint({mark!r})\n", encoding="utf-8")
        output = Path(folder) / "output"
        errors = Path(folder) / "errors"
        with output.open("wb") as stdout, errors.open("wb") as stderr:
            timed_out, code, isolated = _run(
                program, timeout_seconds, memory_bytes, stdout.fileno(), stderr.fileno()
            )
        printed = output.read_bytes().rstrip().rpartition(b"\n")[2]
        error = errors.read_bytes()[-ERROR_CHARACTERS:].decode("utf-8", errors="replace").strip()
    if timed_out:
        return ProgramRun("timed out", f"it ran for {timeout_seconds} seconds", isolated)
    passed = code == 0 and printed == mark.encode()
    return ProgramRun(
        "passed" if passed else "failed",
        "" if passed else error or f"exit code {code}, before its end",
        isolated,
    )


def _run(
    program: Path, timeout_seconds: float, memory_bytes: int, stdout: int, stderr: int
) -> tuple[bool, int, bool]:
    """Whether its time was over, its exit code, and whether it had no network."""
    reading, writing = os.pipe()
    arguments = [str(int(timeout_seconds) + 1), str(memory_bytes), str(writing), str(program)]
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(program.parent),
        "TMPDIR": str(program.parent),
        "PYTHONHASHSEED": "0",
    }
    try:
        process = subprocess.Popen(
            # -I ignores the user's environment and site-packages, -S the installed ones.
            [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, *arguments],
            cwd=program.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=(writing,),
            start_new_session=True,
        )
    finally:
        # Otherwise reading the pipe would never end, as this process could still write.
        os.close(writing)
    try:
        code = process.wait(timeout=timeout_seconds)
        timed_out = False
    except subprocess.TimeoutExpired:
        code = -signal.SIGKILL
        timed_out = True
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # The program may have started others, which are in its group.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        isolated = os.read(reading, 1) == b"1"
        os.close(reading)
    return timed_out, code, isolated
