"""Faults on request, to see what a run does when a process dies, a disk fills or a loss is NaN.

Only the environment asks for them, never a recipe or a checkpoint:

    FAULT=KIND@SITE:N[:RANK]        several are separated by commas

A fault happens when the process of that rank (every rank without one) passes the site for the N-th
time, counted from 1; ``N+`` means each time from the N-th on. Without ``FAULT`` a site costs one
comparison.
"""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from pretrain.core.errors import USAGE, ConfigError

VARIABLE = "FAULT"
# A tensor, or a float: what can be multiplied by NaN. Its module is not imported here.
Poisoned = TypeVar("Poisoned")

KINDS = {
    "kill": "SIGKILL, as the kernel does when memory runs out",
    "exit": "the process ends at once with exit code 1",
    "stop": "SIGSTOP: the process hangs until SIGCONT",
    "nan": "the value at the site becomes NaN",
    "enospc": "OSError: no space left on device",
    "eio": "OSError: input/output error",
    "slow": "a pause; slow=SECONDS",
}
SITES = {
    "step.begin": "before the batches of a training step are read",
    "step.backward": "the loss of a micro batch, before its backward pass; takes nan",
    "step.update": "after the last backward pass of a step, before the optimizer",
    "save.begin": "a save begins; nothing is written",
    "save.snapshot": "before the state is copied to host memory",
    "save.write_weights": "before a rank's file of weights is written",
    "save.write_optimizer": "before a rank's file of optimizer state is written",
    "save.write_rank": "before the other state of a rank is written, such as its random state",
    "save.write_shared": "before rank 0 writes recipe, state and tokenizer",
    "save.sync": "before a file is flushed to disk and hashed",
    "save.manifest": "before rank 0 writes the manifest",
    "save.rename": "before the temporary folder gets its final name",
    "save.pointer": "before latest moves to the new checkpoint",
    "save.remove_old": "before old checkpoints are removed",
    "save.end": "the save is complete",
    "load.begin": "before a checkpoint is opened",
    "load.weights": "before weights are restored",
    "load.optimizer": "before optimizer state is restored",
    "load.end": "everything is restored",
    "data.read": "before the loader reads the batches of a step",
    "preprocess.unit": "before a worker converts a unit of documents",
    "preprocess.merge": "before finished units are merged into a shard",
    "preprocess.publish": "before a shard, and at last the manifest, gets its final name",
}
# Where ``poison`` is called.
TAKES_NAN = ("step.backward",)

PATTERN = re.compile(
    r"(?P<kind>[a-z]+)(=(?P<seconds>\d+(\.\d+)?))?@(?P<site>[a-z_.]+)"
    r":(?P<count>[1-9]\d*)(?P<onwards>\+)?(:(?P<rank>\d+))?"
)
SYNTAX = f"write {VARIABLE}=KIND@SITE:N[:RANK], N from 1, slow as slow=SECONDS"
# Launchers give a process its rank under different names.
RANK_VARIABLES = ("RANK", "SLURM_PROCID", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")


@dataclass(frozen=True)
class Fault:
    """One entry of ``FAULT``.

    Attributes:
        count: the pass of the site that it happens at, from 1.
        onwards: whether it happens at each later pass too.
        rank: None for every rank.
        seconds: of a pause.
    """

    kind: str
    site: str
    count: int
    onwards: bool
    rank: int | None
    seconds: float

    def is_due(self, passes: int, rank: int) -> bool:
        """Whether it happens at this pass in the process of this rank."""
        if self.rank is not None and self.rank != rank:
            return False
        return passes == self.count or (self.onwards and passes > self.count)


class Plan:
    """The faults of this process, and how often it has passed each site."""

    def __init__(self, faults: list[Fault], rank: int) -> None:
        self.faults = faults
        self.rank = rank
        self._passes: Counter[str] = Counter()
        # A background thread may save while the main thread trains.
        self._lock = threading.Lock()

    def due(self, site: str) -> list[Fault]:
        """Count a pass of a site, and return what is to happen."""
        with self._lock:
            self._passes[site] += 1
            passes = self._passes[site]
        return [
            fault for fault in self.faults if fault.site == site and fault.is_due(passes, self.rank)
        ]


# None unless the environment asks for faults: that is all that a site checks.
_plan: Plan | None = None


def parse(text: str) -> list[Fault]:
    """Read the value of ``FAULT``.

    Raises:
        ConfigError: for an unknown kind or site, or another form.
    """
    return [_parse_one(entry.strip()) for entry in text.split(",") if entry.strip()]


def _parse_one(entry: str) -> Fault:
    found = PATTERN.fullmatch(entry)
    kind, site = (found["kind"], found["site"]) if found else ("", "")
    if found is None:
        _refuse(entry, "has another form")
    if kind not in KINDS:
        _refuse(entry, f"has the unknown kind '{kind}'")
    if site not in SITES:
        _refuse(entry, f"has the unknown site '{site}'")
    if (kind == "slow") != (found["seconds"] is not None):
        _refuse(entry, "needs its seconds" if kind == "slow" else f"'{kind}' takes no seconds")
    if kind == "nan" and site not in TAKES_NAN:
        _refuse(entry, f"nan is possible at {', '.join(TAKES_NAN)} only")
    return Fault(
        kind=kind,
        site=site,
        count=int(found["count"]),
        onwards=found["onwards"] is not None,
        rank=None if found["rank"] is None else int(found["rank"]),
        seconds=float(found["seconds"] or 0),
    )


def _refuse(entry: str, reason: str) -> NoReturn:
    raise ConfigError(
        f"{VARIABLE}: '{entry}' {reason}: {SYNTAX}; kinds: {', '.join(KINDS)}; "
        f"sites: {', '.join(SITES)}"
    )


def arm(environment: Mapping[str, str]) -> None:
    """Take the faults that the environment asks for, with a warning; commands start with it.

    Raises:
        ConfigError: if ``FAULT`` cannot be read.
    """
    global _plan
    text = environment.get(VARIABLE, "")
    if not text:
        _plan = None
        return
    rank = int(next((environment[name] for name in RANK_VARIABLES if name in environment), "0"))
    _plan = Plan(parse(text), rank)
    if rank == 0:
        print(f"warning: {VARIABLE}={text}: this process injects faults", file=sys.stderr)


def arm_or_exit(environment: Mapping[str, str]) -> None:
    """As :func:`arm`; a value that cannot be read is one sentence and exit code 2."""
    try:
        arm(environment)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE)


def reached(site: str) -> None:
    """Let the faults of a site happen, if any.

    Raises:
        OSError: with ENOSPC or EIO, if that is the fault.
    """
    if _plan is not None:
        _happen(_plan, site)


def poison(site: str, value: Poisoned) -> Poisoned:
    """As :func:`reached`; returns the tensor or float, multiplied by NaN if that is the fault."""
    if _plan is None or not _happen(_plan, site):
        return value
    # Not in place, so that the gradient of a loss becomes NaN as well.
    return value * math.nan  # type: ignore[operator, return-value]


def _happen(plan: Plan, site: str) -> bool:
    """Let the faults of a site happen; True if its value is to become NaN."""
    faults = plan.due(site)
    for fault in faults:
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "exit":
            # Not sys.exit, which in a background thread would end only that thread.
            os._exit(1)
        elif fault.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.kind == "slow":
            time.sleep(fault.seconds)
        elif fault.kind in ("enospc", "eio"):
            number = errno.ENOSPC if fault.kind == "enospc" else errno.EIO
            raise OSError(number, f"{os.strerror(number)} ({VARIABLE} at {site})")
    return any(fault.kind == "nan" for fault in faults)
