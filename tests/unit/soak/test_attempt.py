"""An attempt of a drill: its exit code, and processes that outlive their parent."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from pretrain.core.errors import ConfigError
from pretrain.soak.attempt import LAUNCHER, Attempt, Layout, training_command

LEAVES_A_CHILD = (
    "import subprocess, sys\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "sys.exit(9)\n"
)


def test_the_exit_code_is_kept_and_an_orphan_is_found_and_killed(tmp_path: Path) -> None:
    attempt = Attempt([sys.executable, "-c", LEAVES_A_CHILD], 1, tmp_path / "output.txt")
    deadline = time.monotonic() + 30
    while attempt.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    orphans = attempt.orphans(0.2)
    assert len(orphans) == 1 and "time.sleep(600)" in orphans[0]
    assert attempt.code == 9 and attempt.alive() == []


def test_a_command_that_ends_while_it_is_waited_for_keeps_its_code(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys, time; time.sleep(0.5); sys.exit(9)"]
    attempt = Attempt(command, 1, tmp_path / "output.txt")
    assert list(attempt.victims()) == [LAUNCHER]
    assert attempt.orphans(30) == [] and attempt.code == 9


def test_a_topology_is_read_from_its_names_and_others_are_refused() -> None:
    assert Layout.parse("ranks=2,ep_size=1,zero=2") == Layout(2, 1, 2)
    assert str(Layout.parse("ranks=4")) == "ranks=4,zero=1"
    shared = Layout.parse("ranks=4,ep_size=2,sp_size=2")
    assert shared == Layout(4, 2, 1, 2) and str(shared) == "ranks=4,ep_size=2,sp_size=2,zero=1"
    assert "parallel.sp_size=2" in training_command(shared, "debug", [])
    for text in ("2", "ranks=0", "ranks=a", "world=2", "zero=1"):
        with pytest.raises(ConfigError, match="--topologies"):
            Layout.parse(text)
