"""The benchmarks start, measure and write what they say, at sizes that take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        env=os.environ | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_growth_is_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    result, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    paths = ("--json", str(result), "--plot", str(plot))
    done = run("cost_growth.py", "--quick", "--only", "ranks", *paths)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(result.read_text("utf-8"))
    assert [point["value"] for point in found["points"]["ranks"]] == [1, 2]
    assert all(point["ratio"] > 0 for point in found["points"]["ranks"])
    assert found["growth"]["ranks"].keys() >= {"cost", "floor", "reason", "is_faster"}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_projection_is_printed_and_written(tmp_path: Path) -> None:
    result = tmp_path / "projection.json"
    done = run("projection.py", "--operations", "fine", "--json", str(result))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not measured" in done.stdout
    assert len(json.loads(result.read_text("utf-8"))["projection"]) == 6


@pytest.mark.parametrize("part", ["layer", "step", "kernels"])
def test_without_a_gpu_one_sentence_says_so(part: str) -> None:
    done = run("on_gpu.py", part, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr and done.stderr.count("\n") == 1


def test_a_cpu_only_checks_the_script() -> None:
    done = run("on_gpu.py", "step", "--device", "cpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "add --quick" in done.stderr


@pytest.mark.parametrize(
    ("part", "only", "variables"),
    [
        ("layer", ["ours", "DeepSpeed native"], {}),
        ("step", ["plain ZeRO 1, no documents"], {}),
        ("kernels", ["coarse"], {"TRITON_INTERPRET": "1"}),
    ],
)
def test_the_parts_for_a_gpu_work(
    part: str, only: list[str], variables: dict[str, str], tmp_path: Path
) -> None:
    result = tmp_path / "part.json"
    options = ("--device", "cpu", "--quick", "--only", *only, "--json", str(result))
    done = run("on_gpu.py", part, *options, CUDA_VISIBLE_DEVICES="", **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(result.read_text("utf-8"))
    assert found["date"] and found["hardware"]["processor"] and found["part"] == part
    rows = [row for sides in found["results"].values() for row in sides.values()]
    assert rows and not any("failed" in row for row in rows)
    if part == "kernels":
        assert all(row["close"] for row in rows)
    if part == "step":
        assert all(row["profile"] and row["tokens_per_second"] > 0 for row in rows)


def test_an_unknown_side_is_refused() -> None:
    done = run("on_gpu.py", "layer", "--device", "cpu", "--quick", "--only", "theirs")
    assert done.returncode == 2 and "choose of" in done.stderr
