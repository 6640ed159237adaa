"""The fused kernels of MoE layers: equality in Triton's interpreter, code for a GPU, and the bytes
that a layer reads and writes.
"""

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

from pretrain.model.kernels import gated_triton, rows_triton
from tests.support.moe_traffic import traffic_of_a_layer
from tests.support.paths import ROOT, WORKERS
from tests.support.traffic import Traffic


def test_fused_kernels_equal_the_plain_code() -> None:
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        str(WORKERS / "triton_fused_moe.py"),
    ]
    finished = subprocess.run(
        command, env=os.environ | interpret, cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


# Of each kernel: how many tensors of rows, then the other arguments in order, then constants.
INTS, WEIGHTS, NUMBER, FLOAT = "*i64", "*fp32", "i32", "fp32"
ROWS = {"K": 6, "D": 2048, "COLUMNS": 512}
UNITS: dict[str, Any] = {"BLOCK": gated_triton.BLOCK}
COMPILED: dict[str, tuple[Any, list[str], dict[str, Any]]] = {
    "gather": (rows_triton.gather_kernel, ["x", "x", INTS, NUMBER], {**ROWS, "ROWS": 8}),
    "combine": (
        rows_triton.combine_kernel,
        ["x", "x", INTS, WEIGHTS, NUMBER],
        {**ROWS, "WEIGHTED": True, "TOKENS": 8},
    ),
    "sum": (
        rows_triton.combine_kernel,
        ["x", "x", INTS, "x", NUMBER],
        {**ROWS, "WEIGHTED": False, "TOKENS": 8},
    ),
    "combine_backward": (
        rows_triton.combine_backward_kernel,
        ["x", WEIGHTS, "x", "x", INTS, WEIGHTS, NUMBER],
        {**ROWS, "CHOICES": 8, "TOKENS": 8},
    ),
    "gated": (
        gated_triton.gated_kernel,
        ["x"] * 3 + [NUMBER, FLOAT, FLOAT],
        {**UNITS, "CLAMPED": False},
    ),
    "clamped": (
        gated_triton.gated_kernel,
        ["x"] * 3 + [NUMBER, FLOAT, FLOAT],
        {**UNITS, "CLAMPED": True},
    ),
    "gated_backward": (
        gated_triton.gated_backward_kernel,
        ["x"] * 5 + [NUMBER, FLOAT, FLOAT],
        {**UNITS, "CLAMPED": False},
    ),
    "clamped_backward": (
        gated_triton.gated_backward_kernel,
        ["x"] * 5 + [NUMBER, FLOAT, FLOAT],
        {**UNITS, "CLAMPED": True},
    ),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kernel", COMPILED)
def test_kernels_compile_for_a_gpu(
    kernel: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without atomic additions; memory is read 16 bytes at a time; narrow values are rounded to the
    nearest, not cut off.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function, types, constants = COMPILED[kernel]
    types = [f"*{dtype}" if name == "x" else name for name in types]
    signature = dict(zip(function.arg_names, types, strict=False)) | dict.fromkeys(
        constants, "constexpr"
    )
    # What a launch finds out itself: addresses and sizes are multiples of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(types)
        if name.startswith("*") or name == NUMBER
    }
    compiled = triton.compile(
        ASTSource(function, signature, constants, aligned), target=GPUTarget("cuda", 90, 32)
    )
    code = compiled.asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", code)
    assert re.search(r"ld\.global\.v4\.b32", code) and re.search(r"st\.global\.v4\.b32", code)
    rounds = {"fp32": None, "bf16": r"cvt\.rn\.bf16", "fp16": r"cvt\.rn\.f16"}[dtype]
    # What only copies rounds nothing.
    assert kernel == "gather" or rounds is None or re.search(rounds, code)


def test_a_plain_layer_reads_and_writes_no_more_than_it_did() -> None:
    traffic = traffic_of_a_layer()
    assert dict(traffic.bytes) == {"RD": 52, "RF": 28, "TD": 40}


def test_traffic_is_counted_by_elements_and_type() -> None:
    x = torch.zeros(6, 5, dtype=torch.bfloat16)
    with Traffic({30: "x", 10: "rows"}) as traffic:
        x.view(5, 6).t()
        x.float()
        x[:, :3] @ x[:3]
        x.index_select(0, torch.tensor([4, 1]))
    assert traffic.operators == ["aten::_to_copy", "aten::index_select"]
    assert dict(traffic.bytes) == {"x": 2 + 4, "rows": 2 + 2}
