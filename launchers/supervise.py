"""Runs a launcher: forwards signals to its ranks, ends them with it, and starts it again.

The ranks save at SIGTERM, SIGINT, SIGHUP and SIGUSR1 and end with code 75. The launchers alone lose
that: ``deepspeed`` dies of SIGTERM and leaves its ranks running, and ``torchrun`` forwards the
signal but ends with code 1 and a traceback. If this process is killed, launcher and ranks end too.

With ``--parent PID`` before the command, the end of the process that started this one counts as a
SIGTERM too. With MAX_RESTARTS in the environment a run starts again after a fault.
"""

from __future__ import annotations

import os
import sys

# Python searches a script's folder first, in which pretrain.py hides the package of the same name.
# With -P it does not; the process stays the same.
if __name__ == "__main__" and not sys.flags.safe_path:
    os.execv(sys.executable, [sys.executable, "-P", *sys.orig_argv[1:]])

import contextlib
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from pretrain.core import supervision
from pretrain.core.errors import PEER_LOST, USAGE, ConfigError

SCRIPTS = ("pretrain.py", "pretrain", "moe-pretrain")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Between two looks at the parent, and at the ranks.
PARENT_SECONDS = 0.5
RANKS_SECONDS = 5.0


def say(sentence: str) -> None:
    """Print a sentence on standard error, if the terminal is still there."""
    with contextlib.suppress(OSError):
        print(f"supervise.py: {sentence}", file=sys.stderr, flush=True)


def is_rank(process: psutil.Process) -> bool:
    """Whether a process is Python running the training script.

    Launchers carry the script's name too, but only as a later argument.
    """
    try:
        script = next(
            (argument for argument in process.cmdline()[1:] if not argument.startswith("-")), ""
        )
    except psutil.Error:
        return False
    return Path(script).name in SCRIPTS


def is_alive(process: psutil.Process) -> bool:
    """Whether a process has not ended, also if nobody has read its exit code yet."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def shell_code(code: int) -> int:
    """Return the exit code that a shell has for one of ``Popen``: -N, by signal N, is 128 + N."""
    return code if code >= 0 else 128 - code


class Supervisor:
    """One launcher at a time, with all processes below it.

    Args:
        parent: whose end counts as a SIGTERM; None for nobody's.

    Raises:
        ConfigError: if a time in the environment is no number of seconds.

    Attributes:
        was_asked: whether a signal has asked the run to stop; it does not start again then.
        output: what the launcher has printed, if it is kept.
    """

    def __init__(self, parent: int | None) -> None:
        self.was_asked = False
        self.output: list[str] = []
        self._parent = parent
        self._grace_seconds = supervision.grace_seconds()
        self._launcher_seconds = supervision.launcher_seconds()
        self._launcher: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()

    def install(self) -> None:
        """Forward signals from now on; one that is ignored (``nohup``) stays ignored."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.was_asked = True
        self._stopped.set()
        self._forward(number)

    def run(self, command: list[str], keeps_output: bool) -> int:
        """Run a launcher to its end, and that of all its ranks; return the exit code."""
        self.output = []
        myself = os.getpid()

        def tie() -> None:
            # The kernel ends the launcher when this process dies; the ranks notice it themselves.
            supervision.end_with_parent()
            # It may have died between the fork and that line.
            if os.getppid() != myself:
                os._exit(1)

        # In another session, because Ctrl-C in a terminal would otherwise reach the launcher and
        # the ranks too: a second Ctrl-C interrupts a rank before it has saved.
        self._launcher = subprocess.Popen(
            command,
            start_new_session=True,
            preexec_fn=tie,
            env=os.environ | {supervision.SUPERVISOR: supervision.identity_of(myself)},
            stderr=subprocess.PIPE if keeps_output else None,
            stdout=subprocess.PIPE if keeps_output else None,
        )
        copies = self._copy_output() if keeps_output else []
        code = shell_code(self._wait(self._launcher))
        left = self._end_rest()
        for copy in copies:
            copy.join()
        # A launcher may end with 0 while ranks are left: ``deepspeed`` as a command of its own does
        # if the process between it and the ranks is killed.
        return code or next(iter(left), 0)

    def sleep(self, seconds: float) -> None:
        """Wait, but not longer than until a signal or the parent's end asks to stop."""
        ends = time.monotonic() + seconds
        while not self.was_asked and time.monotonic() < ends:
            self._stopped.wait(min(PARENT_SECONDS, seconds))
            self.was_asked |= self._parent_is_gone()

    def _parent_is_gone(self) -> bool:
        # The kernel gives a process whose parent has ended another one.
        return self._parent is not None and os.getppid() != self._parent

    def _wait(self, launcher: subprocess.Popen[bytes]) -> int:
        """Wait for the launcher; if the parent is gone, the ranks are asked to stop, once.

        A launcher that waits for a host which was cut off, as mpirun and ssh do for ever, ends
        with the code of a lost peer some time after the ranks of this machine.
        """
        asked = False
        ranks_seen, ranks_gone, next_look = False, time.monotonic(), 0.0
        while launcher.poll() is None:
            if not asked and self._parent_is_gone():
                asked = True
                self._handle(signal.SIGTERM, None)
            now = time.monotonic()
            if now >= next_look:
                next_look = now + RANKS_SECONDS
                if any(map(is_rank, self._alive())):
                    ranks_seen, ranks_gone = True, now
            if ranks_seen and now - ranks_gone > self._launcher_seconds:
                self._end_launcher(launcher)
                return PEER_LOST
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(PARENT_SECONDS)
        return launcher.returncode

    def _alive(self) -> list[psutil.Process]:
        return [
            process for process in psutil.Process().children(recursive=True) if is_alive(process)
        ]

    def _end_launcher(self, launcher: subprocess.Popen[bytes]) -> None:
        say(
            "the ranks of this machine have ended, and the launcher still waits for those of other"
            " hosts: it ends now"
        )
        launcher.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(RANKS_SECONDS)
        launcher.kill()
        launcher.wait()

    def _forward(self, number: int) -> None:
        """Send a signal to every rank or, before there are any, to launcher and children."""
        # Orphans are children of this process.
        started = psutil.Process().children(recursive=True)
        for process in [process for process in started if is_rank(process)] or started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _end_rest(self) -> list[int]:
        """End what a launcher that was killed has left; return exit codes of ranks that are not 0.

        The ranks may save first.
        """
        left = psutil.Process().children(recursive=True)
        alive = [process for process in left if is_alive(process)]
        ranks = [process for process in alive if is_rank(process)]
        if alive:
            say(f"the launcher has ended before {len(alive)} of its processes: they end now")
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, stuck = psutil.wait_procs(left, timeout=self._grace_seconds)
        for process in stuck:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(stuck)
        # psutil has set it while it waited.
        codes = [getattr(process, "returncode", None) for process in ranks]
        return [shell_code(code) for code in codes if code]

    def _copy_output(self) -> list[threading.Thread]:
        """Keep the launcher's output line by line, and print it as it comes."""
        assert self._launcher is not None

        def copy(source: IO[bytes], target: IO[bytes]) -> None:
            for line in source:
                self.output.append(line.decode(errors="replace"))
                with contextlib.suppress(OSError):
                    target.write(line)
                    target.flush()

        streams = [
            (self._launcher.stdout, sys.stdout.buffer),
            (self._launcher.stderr, sys.stderr.buffer),
        ]
        threads = [threading.Thread(target=copy, args=pair, daemon=True) for pair in streams]
        for thread in threads:
            thread.start()
        return threads


def run_again_and_again(supervisor: Supervisor, command: list[str]) -> int:
    """Run a launcher, again after faults as far as the budget goes; return the last exit code.

    Raises:
        ConfigError: if no host is left.
    """
    # Only runs that restart pay for the import.
    from pretrain.run import restarts

    budget = restarts.Budget.from_environment(os.environ)
    hosts = restarts.Hosts(list(command))
    pointer = restarts.checkpoint_pointer(command)
    while True:
        before = restarts.newest_checkpoint(pointer)
        code = supervisor.run(hosts.command, keeps_output=hosts.file is not None)
        if supervisor.was_asked:
            return code
        newest = restarts.newest_checkpoint(pointer)
        delay = budget.delay(code, newest != before)
        if delay is None:
            if budget.repairs(code):
                say(
                    f"exit code {code}, and {budget.used} starts in a row have brought no new "
                    "checkpoint: MAX_RESTARTS is used up"
                )
            return code
        if sentence := hosts.note_fault(supervisor.output):
            say(sentence)
        say(
            f"exit code {code}: start {budget.used} of {budget.max_restarts} without a new "
            f"checkpoint follows in {delay:g} s, from {newest or 'the beginning'}"
        )
        supervisor.sleep(delay)
        if supervisor.was_asked:
            return code
        hosts.command = restarts.without_fresh(hosts.command)


def main(command: list[str]) -> int:
    """Run the launcher's command line, and return its exit code as a shell would."""
    parent = None
    if command[:1] == ["--parent"]:
        parent = int(command[1])
        command = command[2:]
    supervision.adopt_orphans()
    try:
        supervisor = Supervisor(parent)
        supervisor.install()
        if os.environ.get("MAX_RESTARTS", "0") in ("", "0"):
            return supervisor.run(command, keeps_output=False)
        return run_again_and_again(supervisor, command)
    except ConfigError as error:
        say(str(error))
        return USAGE
    except (FileNotFoundError, PermissionError) as error:
        say(
            f"{error.filename or command[0]} cannot be started ({error.strerror}): activate the"
            " environment that the project is installed in"
        )
        return USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
