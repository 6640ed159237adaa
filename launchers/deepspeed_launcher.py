"""Runs ``deepspeed``, and ends with the exit code of what it has started.

``deepspeed`` itself ends with 0 if the process that starts the ranks of a machine is killed by a
signal, and with 256 - N if a rank is killed by signal N. This ends with 128 + N, as a shell does.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from deepspeed.launcher import runner

LARGEST_SIGNAL = 64
launched: list[subprocess.Popen[Any]] = []


class Recorded(subprocess.Popen[Any]):
    """A process whose end is looked at after ``deepspeed`` has ignored it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        launched.append(self)


def exit_code(code: int) -> int:
    """Return a shell's exit code for one of ``Popen`` or of ``sys.exit`` with a negative number."""
    if code < 0:
        return 128 - code
    return 128 + 256 - code if code >= 256 - LARGEST_SIGNAL else code


def main() -> int:
    """Run ``deepspeed`` with this process's arguments, and return the exit code."""
    # Its main function reads this name. The last process that it starts runs the ranks.
    subprocess.Popen = Recorded  # type: ignore[misc]
    try:
        runner.main()
    except SystemExit as end:
        return exit_code(end.code) if isinstance(end.code, int) else 1
    return exit_code(launched[-1].returncode or 0) if launched else 0


if __name__ == "__main__":
    sys.exit(main())
