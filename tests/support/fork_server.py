"""Starts Python programs as forks of a process that has imported torch and DeepSpeed already.

Imports take four to six seconds of a core, and most programs that tests start do little else.
A program is a process of its own in all that tests look at: its number, exit code, signals, files,
environment and current folder; it reads its configuration, plugins and data by itself. What only a
new interpreter shows is tested with one: what an import prints or changes, launchers, Python's
options, limits set before the start.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# What most programs import by the time they compute: importing none of it changes the process, as
# tests of import effects show.
PRELOADED = (
    "deepspeed.module_inject.auto_ep_layer",
    # Wraps functions in torch.compile, which imports TorchInductor: DeepSpeed asks it about every
    # optimizer.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "pretrain.train",
    "rich.progress",
    "torch.utils.tensorboard",
)
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
LARGEST_REQUEST = 200_000  # bytes; one packet


class ForkedProgram:
    """The part of ``subprocess.Popen`` that tests use.

    Output goes to files without names, so that a program never waits for its reader.
    """

    cpu_seconds = 0.0  # of all programs that have ended, with the processes they waited for

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        given: str | None = None,
    ) -> None:
        """
        Args:
            command: ``python SCRIPT ...`` or ``python -m MODULE ...``.
            folder: its current folder.
            environment: all of its environment.
            given: its standard input; none is an empty one.
        """
        self.args, self.returncode = list(command), None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._status, status = os.pipe()
        request = {"arguments": self.args[1:], "cwd": str(folder), "env": dict(environment)}
        with tempfile.TemporaryFile() as standard_input:
            standard_input.write((given or "").encode())
            standard_input.seek(0)
            files = [standard_input.fileno(), self._output.fileno(), self._errors.fileno(), status]
            server = _server(environment.get("PYTHONPATH"))
            socket.send_fds(server, [json.dumps(request).encode()], files)
        os.close(status)
        self._ended = ""
        self.pid = int(self._line())

    def _line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            part = os.read(self._status, 1)
            if not part:
                raise RuntimeError(f"the fork server is gone, before the end of {self.args}")
            line += part
        return line.decode()

    def poll(self) -> int | None:
        """The exit code, -N after signal N; None while the program runs."""
        return self._wait(0)

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            code, seconds = json.loads(self._line())
            os.close(self._status)
            self.returncode = code
            ForkedProgram.cpu_seconds += seconds
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once the program has ended."""
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What the program has printed, once it has ended."""
        self.wait(timeout)
        texts = []
        for file in (self._output, self._errors):
            file.seek(0)
            texts.append(file.read().decode().replace("\r\n", "\n"))
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        """To the program alone, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def run_python(
    *command: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    given: str | None = None,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run([sys.executable, *command], capture_output=True, text=True)``, forked."""
    arguments = [sys.executable, *map(str, command)]
    program = ForkedProgram(arguments, cwd or Path.cwd(), env or os.environ, given)
    try:
        stdout, stderr = program.communicate(timeout)
    finally:
        program.kill()
    return subprocess.CompletedProcess(arguments, program.wait(), stdout, stderr)


class _Server(NamedTuple):
    """A server, which ends with the connection to it."""

    search_path: str | None
    connection: socket.socket
    process: subprocess.Popen[bytes]

    def end(self) -> None:
        self.connection.close()
        self.process.wait()


# At most one, of the last program's PYTHONPATH: each holds half a gigabyte.
_servers: list[_Server] = []


def _server(search_path: str | None) -> socket.socket:
    """The connection to a server whose programs search ``search_path`` (PYTHONPATH) for modules."""
    if _servers and _servers[0].search_path == search_path:
        return _servers[0].connection
    _end_servers()
    own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = os.environ | dict.fromkeys(THREADS, "1")
    environment.pop("PYTHONPATH", None)
    process = subprocess.Popen(
        # -P: the folder of a script is not searched for modules, as the launchers have it.
        [sys.executable, "-P", __file__, str(theirs.fileno())],
        # One thread: NumPy starts as many as this says when it is imported.
        env=environment | ({} if search_path is None else {"PYTHONPATH": search_path}),
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    theirs.close()
    _servers.append(_Server(search_path, own, process))
    return own


@atexit.register
def _end_servers() -> None:
    while _servers:
        _servers.pop().end()


def serve(requests: socket.socket) -> None:
    """Fork for each request until the connection ends; returns in the program, to run it."""
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a fork has one thread: what the others hold would stay locked"
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, LARGEST_REQUEST, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            *streams, status = descriptors
            _watch(status)
            become(json.loads(message), streams)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _watch(status: int) -> None:
    """Fork the program, and report its number and its end; returns in the program alone."""
    # A program's number and exit code are known to its parent.
    pid = os.fork()
    if pid == 0:
        os.close(status)
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the program decides; its end has to be reported
    os.write(status, f"{pid}\n".encode())
    _, ended, usage = os.wait4(pid, 0)
    result = [os.waitstatus_to_exitcode(ended), usage.ru_utime + usage.ru_stime]
    with contextlib.suppress(BrokenPipeError):
        os.write(status, f"{json.dumps(result)}\n".encode())
    os._exit(0)


def become(request: dict[str, Any], streams: Sequence[int]) -> None:
    """Make this fork the program of a request, in all but the modules that are imported."""
    for target, descriptor in enumerate(streams):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if hasattr(time, "tzset"):
        time.tzset()
    # All forks would draw the same random numbers.
    random.seed()
    sys.modules["numpy"].random.seed()
    sys.argv = request["arguments"]
    sys.orig_argv = [sys.executable, *sys.argv]


def run_program() -> None:
    """Run ``sys.argv``: a script, or ``-m`` and a module, and its arguments."""
    # The end of a program deletes all objects: bindings of native code print those that are left.
    atexit.register(gc.unfreeze)
    if sys.argv[0] == "-m":
        _, module, *arguments = sys.argv
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    # Else each fork's first garbage collection would copy what it shares with the others.
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
    run_program()
