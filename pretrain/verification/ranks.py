"""Starts the ranks of a resume check on this machine, and waits for them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pretrain.core.errors import (
    BAD_CHECKPOINT,
    BAD_DATA,
    IO_FAILED,
    USAGE,
    CheckpointError,
    ConfigError,
    DataError,
    PipelineError,
    StorageError,
)
from pretrain.core.interrupts import not_for_children
from pretrain.core.launch import training_environment
from pretrain.core.plugins import plugin_arguments
from pretrain.core.shipped import PACKAGE
from pretrain.engine.topology import free_port
from pretrain.verification.job import Job, Observed

WORKER = "pretrain.verification.rank"
# Between two looks at the ranks.
POLL_SECONDS = 0.1
# After one rank has failed: the others may report the same, in a better sentence.
GRACE_SECONDS = 3.0
ERROR = re.compile(r"^error: (.+)$", re.MULTILINE)
ERRORS: dict[int, type[PipelineError]] = {
    USAGE: ConfigError,
    BAD_DATA: DataError,
    BAD_CHECKPOINT: CheckpointError,
    IO_FAILED: StorageError,
}


def run_ranks(job: Job, on_cpu: bool) -> Observed:
    """Start a job's ranks, wait for them, and return what they have seen.

    Args:
        on_cpu: even if there are GPUs.

    Raises:
        PipelineError: with the sentence and the exit code of the rank that failed first.
    """
    folder = Path(job.folder)
    command = [sys.executable, "-m", WORKER, *plugin_arguments(), str(job.write())]
    port = free_port()
    # Ctrl-C reaches this process alone, which ends the ranks.
    with not_for_children():
        processes = [
            subprocess.Popen(
                command,
                env=_environment(rank, job.layout.world_size, port, on_cpu),
                stdout=_log(folder, rank).open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank in range(job.layout.world_size)
        ]
    try:
        failed = _first_failure(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if failed is not None:
        _raise(job, failed, [process.returncode for process in processes])
    return Observed.read(folder)


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _environment(rank: int, world_size: int, port: int, on_cpu: bool) -> dict[str, str]:
    environment = training_environment()
    # The code of this process, also if another checkout is installed.
    path = [str(PACKAGE.parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    environment |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if on_cpu:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all ranks, and return the first one that failed; None if none did."""
    failed: int | None = None
    deadline = float("inf")
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if failed is None:
            failed = next((rank for rank, code in enumerate(codes) if code), None)
            if failed is not None:
                deadline = time.monotonic() + GRACE_SECONDS
        if all(code is not None for code in codes):
            break
        time.sleep(POLL_SECONDS)
    return failed


def _raise(job: Job, failed: int, codes: list[int]) -> None:
    """Raise the error of the ranks as one sentence of this process."""
    for rank in (failed, *range(len(codes))):
        text = _log(Path(job.folder), rank).read_text(encoding="utf-8", errors="replace")
        if sentences := ERROR.findall(text):
            kind = ERRORS.get(codes[rank], PipelineError)
            raise kind(f"at {job.layout}: {sentences[-1]}")
    lines = _log(Path(job.folder), failed).read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    code = codes[failed]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    hint = "; if memory was short, check fewer ranks or on another machine" if code == -9 else ""
    raise PipelineError(f"at {job.layout}: rank {failed} {how}: {last[:300]}{hint}")
