"""The ties between a rank and the processes that started it: it ends when one of them has died.

A launcher that is killed leaves its ranks running, and they hold their GPUs. Two ties prevent it:
the kernel signals a rank whose launcher has died; and a thread of the rank watches the supervisor,
which is its grandparent or further away.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

from pretrain.core.errors import ConfigError

# In a rank's environment: which process supervises it, as :func:`identity_of` writes it.
SUPERVISOR = "MOE_SUPERVISOR"
# Seconds that a rank may take to save after its launcher or supervisor has died.
GRACE = "MOE_GRACE_SECONDS"
DEFAULT_GRACE_SECONDS = 120.0
# Seconds that a launcher may take to end after the last rank of its machine, which others may wait
# for longer: rank 0 runs the last callbacks alone.
LAUNCHER_PATIENCE = "MOE_LAUNCHER_SECONDS"
DEFAULT_LAUNCHER_SECONDS = 300.0
LONGEST_SECONDS = 86400.0
# One of them is set by each launcher that starts its ranks as children. Without one the parent may
# be a shell, whose end must not reach a run that nohup has started.
LAUNCHER_VARIABLES = (
    "CROSS_RANK",  # deepspeed
    "TORCHELASTIC_RUN_ID",
    "PMI_RANK",
    "PMIX_RANK",
    "OMPI_COMM_WORLD_RANK",
)
# From linux/prctl.h; Python has no call for it.
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
# Loaded now, because it must not happen between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def grace_seconds() -> float:
    """Return how long a rank may take to save after its launcher or supervisor has died.

    Raises:
        ConfigError: if the environment has no number of seconds there.
    """
    return _seconds(GRACE, DEFAULT_GRACE_SECONDS)


def launcher_seconds() -> float:
    """Return how long a launcher may take to end after the last rank of its machine.

    Raises:
        ConfigError: if the environment has no number of seconds there.
    """
    return _seconds(LAUNCHER_PATIENCE, DEFAULT_LAUNCHER_SECONDS)


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable, "")
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= LONGEST_SECONDS:
        raise ConfigError(
            f"{variable}={text} is no number of seconds from 0 to {LONGEST_SECONDS:,.0f}: correct"
            " it, or leave it out"
        )
    return seconds


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Let the kernel send this process a signal when its parent dies; Linux only.

    It works while this process is stopped inside a library or holds Python's lock. The tie outlasts
    ``exec`` and does not pass on to children.
    """
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def adopt_orphans() -> None:
    """Let descendants whose parent has died become children of this process; Linux only.

    Otherwise they would become children of process 1, and nobody could find and end them.
    """
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def identity_of(pid: int) -> str:
    """Return a name of a process that no other one has, on any machine or in any container.

    It is the machine's boot, the namespace of process numbers, the number and the start time,
    because numbers are used again. Empty on systems other than Linux.

    Raises:
        OSError: if there is no such process.
    """
    if sys.platform != "linux":
        return ""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    namespace = os.readlink("/proc/self/ns/pid")
    # The name of the program, in parentheses, may hold spaces: fields are counted behind it.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    started = fields.rpartition(")")[2].split()[19]
    return f"{boot}/{namespace}/{pid}/{started}"


def follow_launcher() -> None:
    """End this rank after its launcher or its supervisor has died: save as at SIGTERM, then end.

    A rank that cannot save, because it hangs, is killed after :func:`grace_seconds`. No effect in a
    process that no launcher started.

    Raises:
        ConfigError: if the environment has no number of seconds as the time for saving.
    """
    if sys.platform != "linux":
        return
    watched = []
    if any(name in os.environ for name in LAUNCHER_VARIABLES):
        end_with_parent()
        watched.append(_open(os.getppid()))
    supervisor = os.environ.get(SUPERVISOR, "")
    if supervisor and _is_of_this_machine(supervisor):
        watched.append(_open_supervisor(supervisor))
    if watched:
        threading.Thread(target=_end_after, args=(watched, grace_seconds()), daemon=True).start()


def _is_of_this_machine(identity: str) -> bool:
    """Whether a process is, or was, one that this process can see."""
    return identity.rsplit("/", 2)[0] == identity_of(os.getpid()).rsplit("/", 2)[0]


def _open(pid: int) -> int | None:
    """Return a descriptor that becomes readable when a process ends; None if it has ended."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _open_supervisor(identity: str) -> int | None:
    pid = int(identity.rsplit("/", 2)[1])
    descriptor = _open(pid)
    try:
        # Asked after the descriptor is open: before, the number could pass to another process.
        is_same = identity_of(pid) == identity
    except OSError:
        is_same = False
    return descriptor if is_same else None


def _end_after(watched: list[int | None], grace: float) -> None:
    descriptors = [descriptor for descriptor in watched if descriptor is not None]
    if len(descriptors) == len(watched):
        poll = select.poll()
        for descriptor in descriptors:
            poll.register(descriptor, select.POLLIN)
        poll.poll()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os.kill(os.getpid(), signal.SIGKILL)
