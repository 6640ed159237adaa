"""Faults of ``FAULT`` in a real build of data and a real run: documented ends, nothing torn."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import TOOLS
from tests.support.tiny_run import SCRIPT, Tiny, curve


def start(command: list[str], fault: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "FAULT"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment | ({"FAULT": fault} if fault else {}),
        capture_output=True,
        text=True,
        timeout=300,
    )


def build(fault: str, folder: Path, output: str) -> subprocess.CompletedProcess[str]:
    options = ["--input", "raw/*.txt", "--vocab-size", "300", "--output", output]
    return start([str(TOOLS / "preprocess_data.py"), *options], fault, folder)


def content(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix in (".bin", ".idx") or path.name == "tokenizer.json"
    }


def test_a_build_survives_a_full_disk_and_a_kill_at_its_last_rename(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for number in range(20):
        (tmp_path / "raw" / f"{number}.txt").write_text(f"text {number} of a few words. " * 50)
    assert build("", tmp_path, "whole").returncode == 0
    full = build("enospc@preprocess.unit:1", tmp_path, "data")
    assert full.returncode == 5 and "free some space" in full.stderr, full.stderr
    assert "Traceback" not in full.stderr and content(tmp_path / "data") == {}
    killed = build("kill@preprocess.publish:3", tmp_path, "data")
    assert killed.returncode == -9 and not (tmp_path / "data" / "manifest.json").exists()
    done = build("", tmp_path, "data")
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "data") == content(tmp_path / "whole") != {}


@pytest.mark.parametrize(
    ("fault", "code"), [("eio@data.read:3", 5), ("kill@data.read:3", -9), ("exit@data.read:3", 1)]
)
def test_a_run_that_dies_while_it_reads_data_continues_as_if_nothing_had_happened(
    fault: str, code: int, tiny: Tiny, tmp_path: Path, six_steps: Path
) -> None:
    run = tmp_path / "run"
    died = start([str(SCRIPT), *tiny.arguments(run, steps=6)], fault, tmp_path)
    assert died.returncode == code and "Traceback" not in died.stderr, died.stderr
    done = start([str(SCRIPT), *tiny.arguments(run, steps=6)], "", tmp_path)
    assert done.returncode == 0, done.stderr
    assert curve(run) == curve(six_steps)
