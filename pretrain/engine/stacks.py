"""Where the threads of this process are, and its end while some of them are stuck."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from pretrain.core.errors import PEER_LOST

# Files whose functions wait for other ranks.
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
# Of torch's compiler, of Triton's and of C++: (end of the file's name, part of the function's).
# Wrappers of the first also run compiled code, so the file alone does not suffice.
COMPILERS = (
    ("torch/_dynamo/convert_frame.py", "compile"),
    ("torch/_inductor/compile_fx.py", "compile_fx"),
    ("torch/utils/cpp_extension.py", "_write_ninja_file_and_build_library"),
    ("triton/compiler/compiler.py", "compile"),
)
# A file system that hangs must not keep the process alive.
WRITING_SECONDS = 3.0

_log: list[Path] = []


def write_stacks_to(path: Path) -> None:
    """Choose the log that gets the stacks of this process, if it is ended."""
    _log[:] = [path]


def has_log() -> bool:
    """Whether the run has a log by now."""
    return bool(_log)


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def main_thread_place() -> str:
    """Return file, line and function of the main thread's innermost Python call."""
    frame = _main_frame()
    if frame is None:
        return ""
    code = frame.f_code
    return f"{Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name})"


def is_communicating() -> bool:
    """Whether the main thread is inside a collective of torch or DeepSpeed, as far as is seen."""
    frame = _main_frame()
    # Decorators add a few frames.
    for _ in range(4):
        if frame is None:
            return False
        if any(part in frame.f_code.co_filename for part in COLLECTIVES):
            return True
        frame = frame.f_back
    return False


def is_compiling() -> bool:
    """Whether any thread of this process is compiling, which may take minutes."""
    for frame in sys._current_frames().values():
        caller: FrameType | None = frame
        while caller is not None:
            code = caller.f_code
            if any(
                code.co_filename.endswith(file) and function in code.co_name
                for file, function in COMPILERS
            ):
                return True
            caller = caller.f_back
    return False


def _write_log(sentence: str) -> None:
    rank = os.environ.get("RANK", "0")
    for path in _log:
        # Not through logging: the thread that is stuck may hold its lock.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(descriptor, f"{now},000 [rank {rank}] CRITICAL watchdog: {sentence}\n".encode())
        os.write(descriptor, f"stacks of all threads of rank {rank}:\n".encode())
        faulthandler.dump_traceback(descriptor, all_threads=True)
        os.close(descriptor)


def write_stacks(sentence: str) -> None:
    """Write a sentence and the stacks of all threads to the run's log, if that can be written."""
    writer = threading.Thread(target=_write_log, args=(sentence,), daemon=True)
    writer.start()
    writer.join(WRITING_SECONDS)


def ends_process(sentence: str) -> None:
    """Report a lost peer, and end this process with exit code 7, whatever it is doing."""
    write_stacks(sentence)
    # Unbuffered: the lock of sys.stderr may be held by the thread that is stuck.
    # A progress bar may be on the line.
    os.write(2, f"\nerror: {sentence}\n".encode())
    os._exit(PEER_LOST)
