"""Ctrl-C: one sentence and exit code 130, whatever the program is doing at the moment."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypeVar

Value = TypeVar("Value")

# 128 + SIGINT, as a shell reports it.
INTERRUPTED = 130
RUN_AGAIN = "run the same command again to continue"


class _CtrlC:
    """The handler: the first Ctrl-C unwinds the program, a second one ends it at once.

    While a module is imported nothing is unwound: libraries mistake the exception for another one
    (NumPy's import then fails, or crashes the process), and there is nothing to tidy up yet.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            leave("interrupted again: nothing more is tidied up")
        if _is_importing(frame):
            leave("interrupted")
        raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def install() -> None:
    """From now on Ctrl-C ends this process without a traceback, also during imports.

    Commands call it before anything else. A process that was started to ignore Ctrl-C (``nohup``, a
    shell's background job) still ignores it.
    """
    # Only Python's default is replaced: an ignored signal, or a handler of a host program, stays.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _CtrlC())
    sys.excepthook = _uncaught
    sys.unraisablehook = _swallowed


def leave(sentence: str) -> NoReturn:
    """Print a sentence and end the process at once.

    Threads of native libraries are not joined; worker processes end with it.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        # The stream is closed, or was interrupted during a write.
        except (OSError, RuntimeError, ValueError):
            continue
    # Unbuffered: a lock of sys.stderr may be held by the code that was interrupted.
    os.write(2, f"\n{sentence}; {RUN_AGAIN}.\n".encode())
    os._exit(INTERRUPTED)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        leave("interrupted")
    sys.__excepthook__(kind, error, trace)


def _swallowed(found: Any) -> None:
    """Inside a destructor Python would print the interruption and continue."""
    if isinstance(found.exc_value, KeyboardInterrupt):
        leave("interrupted")
    sys.__unraisablehook__(found)


@contextmanager
def deferred() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block; no effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []
    # Python allows signal handlers in the main thread only.
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if seen:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def not_for_children() -> Iterator[None]:
    """Processes started inside the block never see a Ctrl-C; their parent ends them.

    A terminal sends it to all of its processes.
    """
    with deferred():
        # Children inherit the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def interruptible(function: Callable[[], Value]) -> Value:
    """Call a native library's function in a thread, so that Ctrl-C need not wait for it."""
    result: Future[Value] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    # A daemon thread: the process may end while the native call still runs.
    threading.Thread(target=run, daemon=True).start()
    return result.result()
