"""Fused rotation, loss and routing: in Triton's interpreter, and compiled for a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pretrain.model.kernels.loss_triton import _chunk_loss_kernel
from pretrain.model.kernels.rope_triton import _rope_kernel
from pretrain.model.kernels.router_triton import _route_backward_kernel, _route_kernel
from tests.support.paths import ROOT, WORKERS


def test_fused_kernels_equal_the_plain_code() -> None:
    """In a process of its own: whether Triton interprets is decided when it is imported, and other
    tests import it.
    """
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [*command, str(WORKERS / "triton_dense_kernels.py")],
        env=os.environ | interpret,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


ROPE = {"KEPT": 0, "HALF": 64, "ROWS": 32, "PAIRS": 64, "COLUMNS": 1, "INVERSE": False}
ROUTE = {"E": 60, "K": 6, "SIGMOID": False, "NORMALIZED": True, "TOKENS": 16, "EXPERTS": 64}
CHOICE = {"HAS_BIAS": True, "IS_GIVEN": False, "CHOICES": 8}
LOSS = {"V": 131072, "COLUMNS": 8192, "IGNORED": -100}
FLOATS, SCALARS = ["*fp32"], ["fp32"]
OUTPUTS = [*FLOATS, "*i64", *FLOATS * 3]


def rope_types(dtype: str) -> list[str]:
    return [f"*{dtype}"] * 2 + FLOATS * 2 + ["i32"] * 3 + ["i64"] * 10


COMPILED: dict[str, tuple[Any, list[str], dict[str, Any]]] = {
    "rope, bf16": (_rope_kernel, rope_types("bf16"), ROPE),
    "rope of a part, backwards, fp16": (
        _rope_kernel,
        rope_types("fp16"),
        ROPE | {"KEPT": 512, "HALF": 32, "PAIRS": 32, "ROWS": 64, "COLUMNS": 32, "INVERSE": True},
    ),
    "loss, bf16": (
        _chunk_loss_kernel,
        ["*bf16", "*i64", *FLOATS * 2, *SCALARS, "i32"],
        LOSS,
    ),
    "loss, fp32, odd": (
        _chunk_loss_kernel,
        ["*fp32", "*i64", *FLOATS * 2, *SCALARS, "i32"],
        LOSS | {"V": 50257},
    ),
    "route, softmax": (
        _route_kernel,
        [*OUTPUTS, *FLOATS * 2, "*i64", "i32", *SCALARS * 3],
        ROUTE | CHOICE,
    ),
    "route, sigmoid, given": (
        _route_kernel,
        [*OUTPUTS, *FLOATS * 2, "*i64", "i32", *SCALARS * 3],
        ROUTE | CHOICE | {"SIGMOID": True, "HAS_BIAS": False, "IS_GIVEN": True},
    ),
    "gradient of route, softmax": (
        _route_backward_kernel,
        [*FLOATS * 5, "*i64", "i32", *SCALARS * 3],
        ROUTE,
    ),
    "gradient of route, sigmoid": (
        _route_backward_kernel,
        [*FLOATS * 5, "*i64", "i32", *SCALARS * 3],
        ROUTE | {"SIGMOID": True, "E": 256, "EXPERTS": 256, "TOKENS": 4},
    ),
}


@pytest.mark.parametrize("kernel", COMPILED)
def test_kernels_compile_for_a_gpu_and_add_nothing_atomically(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter takes much that the compiler refuses."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function, types, constants = COMPILED[kernel]
    names = [name for name in function.arg_names if name not in constants]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32)
    )
    assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])
