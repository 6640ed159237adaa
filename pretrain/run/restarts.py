"""Whether, when and on which hosts a run starts again after a fault; ``supervise.py`` asks.

Only what a new start can repair is started again, and as often as the budget allows. A start that
has written a checkpoint was worth it: it costs nothing of the budget.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from pretrain.config.load import load_recipe
from pretrain.core.cli import add_recipe_options
from pretrain.core.errors import (
    BAD_CHECKPOINT,
    BAD_DATA,
    DONE,
    IO_FAILED,
    NON_FINITE,
    PREEMPTED,
    USAGE,
    ConfigError,
    PipelineError,
)
from pretrain.core.interrupts import INTERRUPTED
from pretrain.core.plugins import add_plugin_option

# A new start would end in the same way, or nobody wants one. 126 and 127 are a shell's codes for a
# launcher that does not run.
FINAL_CODES = (DONE, USAGE, BAD_DATA, BAD_CHECKPOINT, IO_FAILED, NON_FINITE, 126, 127, INTERRUPTED)
SCRIPT_NAMES = ("pretrain.py", "pretrain", "moe-pretrain")
FIRST_DELAY_SECONDS = 5.0
LARGEST_DELAY_SECONDS = 300.0
FAULTS_OF_A_BAD_HOST = 2
# How launchers name the host on which a rank has failed. MPICH's report, and that of pdsh, which
# deepspeed uses for several machines.
MPICH_HOST = re.compile(r"PID \d+ RUNNING AT (\S+)")
PDSH_HOST = re.compile(r"^pdsh@\S+: (\S+): ssh exited with exit code (\d+)")


class _SilentParser(argparse.ArgumentParser):
    """Reads options that the ranks read again, and leaves errors to them."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def script_index(command: Sequence[str]) -> int | None:
    """Return the position of the training script in a launcher's command; None without one."""
    for index, part in enumerate(command):
        if index > 0 and Path(part).name in SCRIPT_NAMES:
            return index
    return None


def checkpoint_pointer(command: Sequence[str]) -> Path | None:
    """Return the file that names the newest checkpoint of the run that a command starts.

    None if the command or its recipe is wrong: then the ranks report it.
    """
    script = script_index(command)
    if script is None:
        return None
    parser = _SilentParser(add_help=False)
    add_plugin_option(parser)
    add_recipe_options(parser)
    try:
        options, _ = parser.parse_known_args(command[script + 1 :])
        recipe = load_recipe(options.recipe, options.overrides)
    except (PipelineError, OSError):
        return None
    return Path(recipe.output_path) / "checkpoints" / "latest"


def newest_checkpoint(pointer: Path | None) -> str | None:
    """Return the name of the newest checkpoint; None if there is none yet."""
    try:
        return None if pointer is None else pointer.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def without_fresh(command: Sequence[str]) -> list[str]:
    """Return a command that continues the run that ``--fresh`` began, and does not delete it."""
    script = script_index(command) or 0
    options = ("--fresh", "--overwrite")
    # argparse accepts unique beginnings of an option too.
    kept = [
        part
        for part in command[script:]
        if not (len(part) > 2 and any(option.startswith(part) for option in options))
    ]
    return [*command[:script], *kept]


@dataclass
class Budget:
    """How often a run may start again without progress, and how long it waits before.

    Attributes:
        max_restarts: starts in a row that bring no new checkpoint.
        restarts_preempted: whether a run that was asked to stop, and saved, starts again.
        first_delay_seconds: before the first restart; each further one without progress doubles it.
    """

    max_restarts: int = 0
    restarts_preempted: bool = False
    first_delay_seconds: float = FIRST_DELAY_SECONDS
    used: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Budget:
        """Make it from MAX_RESTARTS, RESTART_PREEMPTED and RESTART_DELAY_SECONDS.

        Raises:
            ConfigError: if one of them is no number.
        """
        try:
            return cls(
                int(environment.get("MAX_RESTARTS") or 0),
                environment.get("RESTART_PREEMPTED", "0") not in ("", "0"),
                float(environment.get("RESTART_DELAY_SECONDS") or FIRST_DELAY_SECONDS),
            )
        except ValueError as error:
            raise ConfigError(
                f"MAX_RESTARTS, RESTART_PREEMPTED and RESTART_DELAY_SECONDS are numbers: {error}"
            ) from None

    def repairs(self, code: int) -> bool:
        """Whether a new start may repair what an exit code stands for."""
        if code == PREEMPTED:
            return self.restarts_preempted
        return code not in FINAL_CODES

    def delay(self, code: int, has_progress: bool) -> float | None:
        """Return the seconds to wait before the next start; None if there is none.

        Args:
            has_progress: whether the start that ended has written a checkpoint.
        """
        if self.max_restarts == 0 or not self.repairs(code):
            return None
        if has_progress:
            self.used = 0
        if self.used == self.max_restarts:
            return None
        seconds = self.first_delay_seconds * 2.0**self.used
        self.used += 1
        return min(seconds, LARGEST_DELAY_SECONDS)


def failed_host(output: Sequence[str]) -> str | None:
    """Return the host whose rank failed first, from what the launcher has printed.

    None if it does not say: only MPICH's mpirun and deepspeed over several machines do.
    """
    for line in output:
        if found := MPICH_HOST.search(line):
            return found[1]
        found = PDSH_HOST.search(line)
        # Ranks that end with 7 have lost one on another host; those with 75 have saved.
        if found and int(found[2]) not in (7, PREEMPTED):
            return found[1]
    return None


@dataclass
class Hosts:
    """The hosts of a host file, of which those that failed twice are left out.

    Attributes:
        command: the launcher's, with the file of the hosts that are left.
    """

    command: list[str]
    _faults: Counter[str] = field(default_factory=Counter)

    @property
    def file(self) -> Path | None:
        """The host file; None without one."""
        if "--hostfile" not in self.command:
            return None
        return Path(self.command[self.command.index("--hostfile") + 1])

    def note_fault(self, output: Sequence[str]) -> str | None:
        """Count a fault, and return a sentence if it takes a host out of the file.

        Raises:
            ConfigError: if no host would be left.
        """
        host = failed_host(output)
        if self.file is None or host is None:
            return None
        self._faults[host] += 1
        if self._faults[host] < FAULTS_OF_A_BAD_HOST:
            return None
        lines = self.file.read_text(encoding="utf-8").splitlines()
        named = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        kept = [line for line in named if _name(line) != host]
        if len(kept) == len(named):
            return None
        if not kept:
            raise ConfigError(
                f"host {host} has failed {self._faults[host]} times and {self.file} names no other:"
                " repair it, or run the same command with another host file"
            )
        slots = sum(_slots(line) for line in named if _name(line) == host)
        before = self.file
        self._replace(kept, slots)
        return (
            f"host {host} has failed {self._faults[host]} times: the next start is without it and "
            f"its slots ({slots}), with {self.file} in place of {before}"
        )

    def _replace(self, lines: Sequence[str], slots: int) -> None:
        """Let the command read a copy of the host file, and start ``slots`` ranks less."""
        descriptor, path = tempfile.mkstemp(prefix="hosts-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
        self.command[self.command.index("--hostfile") + 1] = path
        # mpirun has the number of all ranks as an option; deepspeed counts the slots of the file.
        launcher = self.command[: script_index(self.command)]
        if "-n" in launcher:
            count = launcher.index("-n") + 1
            self.command[count] = str(max(1, int(self.command[count]) - slots))


def _name(line: str) -> str:
    """The host of a line ``host slots=8`` (deepspeed) or ``host:8`` (MPICH)."""
    return line.split()[0].partition(":")[0]


def _slots(line: str) -> int:
    found = re.search(r"slots\s*=\s*(\d+)", line) or re.match(r"\s*[^\s:]+:(\d+)", line)
    return int(found[1]) if found else 1
