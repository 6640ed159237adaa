"""Settings of libraries for training on CPUs; the values that are computed stay the same."""

from __future__ import annotations

import ctypes
import os
import sys

# From glibc's malloc.h. An option is an int, so that at most 2 GB can be kept.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
KEPT_BYTES = 2**31 - 1
# Kernels of matrix products that oneDNN keeps, of its default of 1024: routing gives experts new
# numbers of rows in each step, and each number has a kernel of its own.
KERNELS = 4096


def tune_for_training() -> None:
    """Keep kernels and freed memory. It must be called before the first matrix product."""
    keep_kernels()
    keep_freed_memory()


def keep_kernels() -> None:
    """Keep compiled kernels for the next step; to be called before the first matrix product."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


def keep_freed_memory() -> None:
    """Keep freed memory for the next step.

    Without it, glibc maps each tensor above 32 MB anew, which costs a page fault for every 4 kB of
    every step's gradients. To be called once the engine is built: memory that is freed before, by
    what is needed at the start alone, goes back to the system.
    """
    # Other libraries of C have no such call: musl's allocator is another one.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
