"""Packages that the project's own environment does not have, for one test's processes alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest


def environment_with(packages: Sequence[str], site: Path, *options: str) -> dict[str, str]:
    """An environment in which Python finds ``packages`` before all others; pip installs them into
    the empty folder ``site``.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "--target",
        str(site),
        *options,
        *packages,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.fail(
            f"{', '.join(packages)} cannot be installed, for which pip needs a package index:"
            f" {done.stderr.strip()[-300:]}"
        )
    paths = os.pathsep.join([str(site), os.environ["PYTHONPATH"]])  # set in tests/conftest.py
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
