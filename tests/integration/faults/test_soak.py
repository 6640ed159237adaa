"""tools/soak.py: a drill of a few kills holds, and a difference would be seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.soak.observed import Curve, curve_difference, curve_of
from tests.support.paths import TOOLS
from tests.support.tiny_run import Tiny


def drill(tiny: Tiny, folder: Path, kills: int, ranks: int) -> dict[str, object]:
    command = [sys.executable, str(TOOLS / "soak.py"), "--recipe", str(tiny.recipe)]
    command += ["--kills", str(kills), "--ranks", str(ranks), "--folder", str(folder)]
    # Steps and saves of so small a model are over before a process can be chosen and killed.
    slow = {"FAULT": "slow=0.1@step.begin:1+,slow=0.3@save.manifest:1+"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=850, env=os.environ | slow
    )
    report = folder / "report.json"
    assert done.returncode == 0, done.stdout + done.stderr
    assert report.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    result: dict[str, object] = json.loads(report.read_text())
    return result


def test_three_kills_leave_no_trace(tiny: Tiny, tmp_path: Path) -> None:
    report = drill(tiny, tmp_path / "soak", kills=3, ranks=1)
    assert report["holds"] and report["kills"]["all"] == 3  # type: ignore[index]
    curve = curve_of(tmp_path / "soak" / "killed")
    assert len(curve) > 12
    # The comparison sees a changed last bit, a missing step and a step too many.
    key = ("train", 7, 0)
    changed: Curve = curve | {key: {**curve[key], "loss": curve[key]["loss"] * (1 + 3e-16)}}
    assert "train of step 7: loss" in curve_difference(curve, changed, 0.0)
    assert curve_difference(curve, changed, 1e-6) == ""
    shorter = {name: values for name, values in curve.items() if name != key}
    assert "in one of the two" in curve_difference(curve, shorter, 1e-6)
    assert "in one of the two" in curve_difference(shorter, curve, 0.0)


@pytest.mark.full
def test_ten_kills_of_ranks_and_launchers_leave_no_trace(tiny: Tiny, tmp_path: Path) -> None:
    report = drill(tiny, tmp_path / "soak", kills=10, ranks=2)
    assert report["holds"] and report["kills"]["all"] == 10  # type: ignore[index]
