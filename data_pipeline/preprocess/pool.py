"""Workers: this process alone, processes of this machine, or the ranks of an MPI job.

Work is handed out as they become free.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar, cast

from pretrain.core.errors import ConfigError, PeerLostError
from pretrain.core.interrupts import not_for_children
from pretrain.core.plugins import load_plugins, loaded_plugins
from pretrain.core.progress import Tally, use_tally

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")

# Enough that no worker waits for the coordinator, few enough that a corpus of any size has a short
# queue.
WAITING_PER_WORKER = 3
WORTH_STARTING_FOR = 64 << 20
THREAD_VARIABLES = ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS", "OMP_NUM_THREADS")
WORKER_ENVIRONMENT = {
    # glibc gives every large text back to the system and asks for it again, page by page, unless it
    # is set to keep some memory.
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
    # A stream of the datasets library would import torch, seconds for nothing.
    "USE_TORCH": "0",
    # The process that removes the pool's semaphores after an interrupted build has nothing to say
    # about them.
    "PYTHONWARNINGS": "ignore:resource_tracker",
}
MPI_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE")


class Submits(Protocol):
    """The part of an executor that is needed; MPI's is no class of the standard library."""

    def submit(self, function: Callable[[JobT], ResultT], job: JobT, /) -> Future[ResultT]:
        """Run the function on the job, in another process, and return its future result."""


class Pool:
    """Runs one function over many jobs and yields the results as they come.

    Args:
        executor: where the jobs run; None: in this process, one after the other.
        is_local: whether all jobs run on this machine.
    """

    def __init__(self, executor: Submits | None, workers: int, is_local: bool = True) -> None:
        self.executor = executor
        self.workers = workers
        self.is_local = is_local

    def begin(self, function: Callable[[JobT], ResultT], job: JobT) -> Future[ResultT]:
        """Start one job ahead of all that come later.

        Without other processes it is done when this returns.
        """
        if self.executor is not None:
            return self.executor.submit(partial(_run_job, function), job)
        future: Future[ResultT] = Future()
        future.set_result(function(job))
        return future

    def run(self, function: Callable[[JobT], ResultT], jobs: Iterable[JobT]) -> Iterator[ResultT]:
        """Yield the results in the order in which they are ready; the first error ends the run."""
        if self.executor is None:
            yield from map(function, jobs)
            return
        run_job = partial(_run_job, function)
        waiting: set[Future[ResultT]] = set()
        remaining = iter(jobs)
        try:
            while True:
                while (
                    len(waiting) < self.workers * WAITING_PER_WORKER
                    and (job := next(remaining, None)) is not None
                ):
                    waiting.add(self.executor.submit(run_job, job))
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in waiting:
                future.cancel()


def _run_job(function: Callable[[JobT], ResultT], job: JobT) -> ResultT:
    """Run a job in a worker, and let its error reach the coordinator whatever it is.

    An exception of a plugin or a library that cannot be pickled would look like a killed worker.
    """
    try:
        return function(job)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError("".join(traceback.format_exception(error))) from None
        raise


class _Executor(ProcessPoolExecutor):
    """An executor whose processes ignore the interrupts of the terminal."""

    def submit(
        self, function: Callable[..., ResultT], /, *arguments: Any, **named: Any
    ) -> Future[ResultT]:
        with not_for_children():
            return super().submit(function, *arguments, **named)


@contextmanager
def local_pool(workers: int) -> Iterator[Pool]:
    """Processes of this machine; one worker is this process itself.

    Raises:
        PeerLostError: at the end of the block, if a worker was killed inside it.
    """
    if workers < 1:
        raise ConfigError(f"--workers {workers}: give 1 or more")
    if workers == 1:
        yield Pool(None, 1)
        return
    threads = str(max(1, len(os.sched_getaffinity(0)) // workers))
    environment = dict.fromkeys(THREAD_VARIABLES, threads) | WORKER_ENVIRONMENT
    before = {name: os.environ.get(name) for name in environment}
    # Workers must find these when they start: allocators and thread pools look only once.
    os.environ |= environment
    # Forking a process with threads may leave a lock taken for ever: workers start afresh.
    context = multiprocessing.get_context("spawn")
    counts = context.Array(ctypes.c_uint64, 2)
    use_tally(Tally(counts))
    executor = _Executor(workers, context, _begin_worker, (counts, loaded_plugins()))
    try:
        yield Pool(executor, workers)
    except BaseException as error:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise PeerLostError(
                "a worker process was killed, perhaps for want of memory: run the same command,"
                " which continues from where it stopped, or lower --workers"
            ) from None
        raise
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    executor.shutdown()


def default_workers(input_bytes: int) -> int:
    """Return the number of cores, or 1 if starting others would take longer than the work."""
    return len(os.sched_getaffinity(0)) if input_bytes >= WORTH_STARTING_FOR else 1


def _begin_worker(counts: Any, plugins: tuple[str, ...]) -> None:
    """Start a worker: it loads the plugins, counts what it reads, and ends with its parent."""
    load_plugins(plugins)
    use_tally(Tally(counts))
    # Documents make no cycles: looking for some after every 700 new objects takes a tenth of the
    # time.
    gc.set_threshold(100_000, 20, 20)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: Any) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def mpi_size(environment: Mapping[str, str]) -> int:
    """Return the number of processes that ``mpirun`` has started; 1 without it."""
    return next(
        (
            int(environment[name])
            for name in MPI_SIZE_VARIABLES
            if environment.get(name, "").isdigit()
        ),
        1,
    )


@contextmanager
def mpi_pool() -> Iterator[Pool | None]:
    """Give rank 0 a pool of all other ranks.

    They serve it inside this call, and get None when it is over.
    """
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor

    for variable in THREAD_VARIABLES:
        os.environ.setdefault(variable, "1")
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        yield (
            Pool(cast(Submits, executor), MPI.COMM_WORLD.Get_size() - 1, is_local=False)
            if executor is not None
            else None
        )
