"""Errors that a user can fix, each with the exit code that docs/exit_codes.md explains.

Every command ends through :func:`run_command`: a known error prints one sentence and sets the exit
code, and a programming error still shows its traceback.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable

from pretrain.core.interrupts import leave

logger = logging.getLogger(__name__)

DONE = 0
USAGE = 2
BAD_DATA = 3
BAD_CHECKPOINT = 4
IO_FAILED = 5
NON_FINITE = 6
PEER_LOST = 7
PREEMPTED = 75


class PipelineError(Exception):
    """An error with a one-sentence message: what is wrong, where, and what to do."""

    exit_code = 1


class ConfigError(PipelineError):
    """A recipe, ds_config or command line that cannot work (exit code 2)."""

    exit_code = USAGE


class DataError(PipelineError):
    """Shards, manifests or tokenizers that are missing, damaged or unrelated (exit code 3)."""

    exit_code = BAD_DATA


class CheckpointError(PipelineError):
    """A checkpoint that is missing, incomplete, damaged or of another run (exit code 4)."""

    exit_code = BAD_CHECKPOINT


class StorageError(PipelineError):
    """No space left, a file that cannot be written, a hub that is away (exit code 5)."""

    exit_code = IO_FAILED


class NonFiniteError(PipelineError):
    """The loss or the weights stopped being finite numbers (exit code 6)."""

    exit_code = NON_FINITE


class GuardError(PipelineError):
    """A guard of the recipe ended the run (exit code 6)."""

    exit_code = NON_FINITE


class PeerLostError(PipelineError):
    """Another rank died or hangs (exit code 7)."""

    exit_code = PEER_LOST


# torch's errors of its stores, of the network below them, and of NCCL. By name: this layer does not
# import torch.
NETWORK_ERRORS = ("DistNetworkError", "DistStoreError", "DistBackendError")
# Texts of the operating system, which gloo passes on, and of libraries.
NETWORK_SIGNS = (
    "gloo/transport/",
    "connectFullMesh",
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Connection timed out",
    "No route to host",
    "Network is unreachable",
    "Network is down",
    "Host is down",
    "Broken pipe",
    "Socket Timeout",
    "NCCL",
    "Timed out waiting",
)


def is_peer_loss(error: BaseException) -> bool:
    """Whether this is how gloo, NCCL or torch's store report that another process is gone."""
    if not isinstance(error, RuntimeError):
        return False
    if any(kind.__name__ in NETWORK_ERRORS for kind in type(error).__mro__):
        return True
    text = str(error)
    return any(sign in text for sign in NETWORK_SIGNS)


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and exit with its documented code.

    Known errors become one sentence on standard error.
    """
    try:
        code = main() or DONE
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        logger.error("%s", error)
        code = error.exit_code
    except OSError as error:
        # Other errors of the operating system are bugs of ours: they keep their traceback.
        if error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EACCES,
            errno.EROFS,
            errno.EIO,
        ):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        print(
            f"error: {os.strerror(error.errno)}{where}: free space or choose another folder, then "
            "run the same command.",
            file=sys.stderr,
        )
        code = IO_FAILED
    # leave() does not return: it skips destructors that may hang.
    except KeyboardInterrupt as error:
        leave(f"interrupted: {error}" if str(error) else "interrupted")
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
