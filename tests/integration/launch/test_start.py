"""What a start imports: only what the run needs, and torch's compiler if something is compiled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_run import SCRIPT, Tiny

COMPILER = {"torch._dynamo", "torch._inductor", "sympy", "networkx"}
NOT_NEEDED = COMPILER | {"torch.onnx", "torch.distributed.fsdp", "pandas", "transformers"}


def imported(tiny: Tiny, run: Path, *overrides: str) -> set[str]:
    """The names of all modules that a finished run has imported, whenever it did."""
    arguments = tiny.arguments(run, *overrides, steps=2, zero=None)
    command = [sys.executable, "-X", "importtime", str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.split("|")[-1].strip() for line in lines}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_a_run_that_compiles_nothing_imports_no_compiler(
    optimizer: str, tiny: Tiny, tmp_path: Path
) -> None:
    modules = imported(tiny, tmp_path / "run", f"optimizer.kind={optimizer}")
    # The last one is imported at the end, by the picture of the curves: the list is complete.
    assert {"torch", "deepspeed", "matplotlib"} <= modules
    assert sorted(modules & NOT_NEEDED) == []


@pytest.mark.full
def test_a_run_that_compiles_imports_it(tiny: Tiny, tmp_path: Path) -> None:
    assert "torch._dynamo" in imported(tiny, tmp_path / "run", "train.compile=blocks")
