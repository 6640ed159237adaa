"""Runs tools one after the other in this process, with its own standard streams: ``python
terminal_worker.py COMMANDS.json``.

Commands are lists, a tool's file name first. After each, a line of "=" and its exit code goes to
both streams.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

from tests.support.paths import TOOLS


def run(tool: str, *arguments: str) -> int:
    sys.argv = [tool, *arguments]
    try:
        runpy.run_path(str(TOOLS / tool), run_name="__main__")
    except SystemExit as left:
        return int(left.code or 0)
    return -1


if __name__ == "__main__":
    for command in json.loads(Path(sys.argv[1]).read_text()):
        code = run(*command)
        for stream in (sys.stdout, sys.stderr):
            print(f"\n={code}=", file=stream, flush=True)
