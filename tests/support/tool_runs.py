"""A tool's command line inside this process: starting Python and importing torch again and again
would be most of a test's time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain.core.errors import run_command
from tests.support.paths import TOOLS


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def run_here(name: str, *arguments: str | Path) -> Done:
    """What ``python tools/NAME ARGUMENTS`` prints and exits with."""
    spec = importlib.util.spec_from_file_location(f"tool_{Path(name).stem}", TOOLS / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        spec.loader.exec_module(module)
        try:
            run_command(module.main)
        except SystemExit as left:
            code = left.code
    assert isinstance(code, int)
    return Done(code, stdout.getvalue(), stderr.getvalue())
