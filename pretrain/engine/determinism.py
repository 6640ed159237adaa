"""Bitwise reproducible results, on the same hardware, libraries and number of ranks."""

from __future__ import annotations

import os

import torch
import torch.utils.deterministic

# cuBLAS chooses among algorithms by free workspace unless this fixes it. Its manual names two
# values; this is the faster one.
CUBLAS_WORKSPACE = ":4096:8"


def be_deterministic() -> None:
    """Let torch use deterministic kernels only; an operation without one raises an error.

    To be called before the first CUDA kernel: cuBLAS reads its variable when it starts.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    # Deterministic mode would also fill every new tensor with NaN, to expose reads of memory that
    # was never written; that costs a kernel per tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
