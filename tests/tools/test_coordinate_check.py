"""The command measures both kinds, tells and draws them, and refuses what it cannot measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--recipe", "debug", "--tokens", "random", "--steps", "2", "--widths", "32", "64", "--set", "model.vocab_size=100"]
SMALL += ["--set", "train.global_batch_size=2", "--set", "train.sequence_length=16"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "coordinate_check.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)


def test_it_measures_prints_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "plots" / "coordinates.png"
    done = run(*SMALL, "--plot", picture, "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    assert "residual" in done.stdout and "verdict" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["widths"], result["base_width"], result["tokens"]) == ([32, 64], 32, "random")
    for kind in ("standard", "mup"):
        for layer in result[kind]["layers"].values():
            assert len(layer["sizes"]) == len(layer["slopes"]) == 3 and all(len(sizes) == 2 for sizes in layer["sizes"])


@pytest.mark.parametrize(
    "arguments,code,sentence",
    [
        (["--widths", "64"], 2, "give two or more"),
        (["--widths", "8", "32"], 2, "num_key_value_heads would be 0.5"),
        (["--plot", str(ROOT / "README.md")], 2, "is there already"),
        (["--set", "optimizer={kind: sgd, learning_rate: 0.1}"], 2, "optimizer.kind=sgd"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    arguments: list[str], code: int, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.config.errors import run_command
    from tools.coordinate_check import main

    monkeypatch.setattr(sys, "argv", ["coordinate_check.py", *SMALL, *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    said = capsys.readouterr().err
    assert ended.value.code == code and sentence in said and "Traceback" not in said
