"""Runs ``deepspeed``, and ends with the exit code of what it has started.

For several machines ``deepspeed`` starts another launcher, such as pdsh, and itself ends with 0 if
that one is killed by a signal. If a rank is killed by signal N, it ends with 256 - N. This ends
with 128 + N in both cases, as a shell does.

For one machine ``deepspeed`` starts a process that imports torch and DeepSpeed once more, for
seconds, before it starts the ranks. Here that module runs in this process, which has imported both.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from deepspeed.launcher import launch, runner

LARGEST_SIGNAL = 64
# How ``deepspeed`` starts the ranks of this machine; options follow.
LAUNCH = [sys.executable, "-u", "-m", launch.__name__]
launched: list[subprocess.Popen[Any]] = []


class OneMachine(Exception):
    """Takes the place of the process that would start the ranks of this machine."""

    def __init__(self, options: list[str]) -> None:
        super().__init__(options)
        self.options = options


class Recorded(subprocess.Popen[Any]):
    """A process whose end is looked at after ``deepspeed`` has ignored it."""

    def __init__(self, command: Any, *arguments: Any, **options: Any) -> None:
        if command[: len(LAUNCH)] == LAUNCH:
            raise OneMachine(command[len(LAUNCH) :])
        super().__init__(command, *arguments, **options)
        launched.append(self)


def exit_code(code: int) -> int:
    """Return a shell's exit code for one of ``Popen`` or of ``sys.exit`` with a negative number."""
    if code < 0:
        return 128 - code
    return 128 + 256 - code if code >= 256 - LARGEST_SIGNAL else code


def run() -> None:
    """Run ``deepspeed`` with this process's arguments."""
    popen = subprocess.Popen
    # Its main function reads this name. The last process that it starts runs the ranks.
    subprocess.Popen = Recorded  # type: ignore[misc]
    try:
        runner.main()
        return
    except OneMachine as machine:
        sys.argv[1:] = machine.options
    # The ranks themselves are started as DeepSpeed does it.
    subprocess.Popen = popen  # type: ignore[misc]
    launch.main()


def main() -> int:
    """Run ``deepspeed``, and return the exit code."""
    try:
        run()
    except SystemExit as end:
        return exit_code(end.code) if isinstance(end.code, int) else 1
    return exit_code(launched[-1].returncode or 0) if launched else 0


if __name__ == "__main__":
    sys.exit(main())
