"""One start of a training command, with every process below it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pretrain.core.errors import ConfigError
from pretrain.core.launch import training_environment
from pretrain.core.plugins import plugin_arguments
from pretrain.core.shipped import LAUNCHERS
from pretrain.engine.topology import free_port

# In the environment of every process of an attempt: it finds those whose parent is gone, too.
MARK = "SOAK_ATTEMPT"
LAUNCHER = "launcher"
SCRIPT = "pretrain.py"


@dataclass(frozen=True)
class Layout:
    """How a run is spread: ``ranks=4,ep_size=2,tp_size=2,zero=1``; the rest is the recipe's."""

    ranks: int
    ep_size: int | None = None
    zero: int = 1
    sp_size: int | None = None
    tp_size: int | None = None

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read ``NAME=NUMBER`` separated by commas.

        Raises:
            ConfigError: for another form or name.
        """
        values: dict[str, int] = {}
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            known = name in ("ranks", "ep_size", "sp_size", "tp_size", "zero")
            if not known or not equals or not value.isdecimal():
                raise ConfigError(
                    f"--topologies: '{text}' is no topology: write "
                    "ranks=4,ep_size=2,sp_size=2,zero=1"
                )
            values[name] = int(value)
        if values.get("ranks", 0) < 1:
            raise ConfigError(f"--topologies: '{text}' needs ranks=N, 1 or more")
        return cls(**values)

    def __str__(self) -> str:
        named = "".join(f",{name}={size}" for name, size in self.sizes.items())
        return f"ranks={self.ranks}{named},zero={self.zero}"

    @property
    def sizes(self) -> dict[str, int]:
        """The recipe's sizes that it changes, by their fields in ``parallel``."""
        named = {"ep_size": self.ep_size, "sp_size": self.sp_size, "tp_size": self.tp_size}
        return {name: size for name, size in named.items() if size is not None}


def training_command(layout: Layout, recipe: str, settings: Sequence[str]) -> list[str]:
    """The command line that starts, and starts again, a run of a recipe."""
    overrides = [*settings, *(f"parallel.{name}={size}" for name, size in layout.sizes.items())]
    launcher = [sys.executable]
    if layout.ranks > 1:
        ranks = str(layout.ranks)
        launcher = ["deepspeed", "--num_accelerators", ranks, "--master_port", str(free_port())]
    return [
        sys.executable,
        str(LAUNCHERS / "supervise.py"),
        "--parent",
        str(os.getpid()),
        *launcher,
        str(LAUNCHERS / SCRIPT),
        "--recipe",
        recipe,
        "--ds_config",
        f"zero{layout.zero}",
        *(part for setting in overrides for part in ("--set", setting)),
        *plugin_arguments(),
    ]


class Attempt:
    """A started training command.

    Args:
        output: gets what all processes print, after what is in it.
    """

    def __init__(self, command: Sequence[str], ranks: int, output: Path) -> None:
        self.mark = uuid.uuid4().hex
        self._command = list(command)
        environment = training_environment()
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        with output.open("ab") as stream:
            self.process = subprocess.Popen(
                command,
                env=environment | {MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        """The exit code of the command; None while it runs."""
        return self.process.poll()

    def alive(self) -> list[psutil.Process]:
        """Every process of the attempt that still runs, wherever it is in the process tree."""
        found = []
        for process in psutil.process_iter():
            # A process may end, or belong to somebody else, while it is looked at.
            with contextlib.suppress(psutil.Error):
                if (
                    process.environ().get(MARK) == self.mark
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
        return found

    def victims(self) -> dict[str, list[psutil.Process]]:
        """What can be killed: ``rank 0``, ``rank 1``, ..., and the processes of the launcher."""
        found: dict[str, list[psutil.Process]] = {}
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                name = LAUNCHER
                if _is_rank(process):
                    name = f"rank {process.environ().get('RANK', '0')}"
                found.setdefault(name, []).append(process)
        return found

    def orphans(self, seconds: float) -> list[str]:
        """Wait until all processes have ended; kill and return the command lines of the rest."""
        end = time.monotonic() + seconds
        # The command itself is waited for below: psutil would take its exit code away.
        others = [process for process in self.alive() if process.pid != self.process.pid]
        left = psutil.wait_procs(others, timeout=seconds)[1]
        lines = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                lines.append(" ".join(process.cmdline())[:200])
                process.kill()
        try:
            self.process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            lines.append(" ".join(self._command)[:200])
            self.process.kill()
            self.process.wait()
        psutil.wait_procs(left, timeout=10)
        return lines


def _is_rank(process: psutil.Process) -> bool:
    """Whether a process is Python running the script; launchers name it as a later argument."""
    arguments = process.cmdline()[1:]
    script = next((part for part in arguments if not part.startswith("-")), "")
    return Path(script).name == SCRIPT
