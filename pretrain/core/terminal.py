"""Standard output and error after their terminal is gone."""

from __future__ import annotations

import errno
import io
import os
import sys


class _Terminal(io.RawIOBase):
    """Writes to a terminal, and to nowhere once it was closed.

    A write to a closed terminal fails with EIO, and the progress bar would end a run that is about
    to save.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        content = bytes(data)  # type: ignore[call-overload]
        try:
            return os.write(self._descriptor, content)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        # Native libraries and child processes write to the descriptor too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._descriptor)
        os.close(nowhere)
        return len(content)


def survive_hangup() -> None:
    """Let standard output and error outlast their terminal; no effect if they are files or pipes.

    A second call changes nothing.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Notebooks and tests put streams there that have no descriptor.
        if not isinstance(stream, io.TextIOWrapper) or not stream.isatty():
            continue
        # Without a buffer (python -u) it is the file itself; another kind was put there before.
        if isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):
            stream.flush()
            buffered = io.BufferedWriter(_Terminal(stream.fileno()))
            terminal = io.TextIOWrapper(
                buffered, stream.encoding, stream.errors, line_buffering=True
            )
            setattr(sys, name, terminal)
