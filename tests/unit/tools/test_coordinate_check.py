"""The command measures both kinds, prints and draws them, and refuses what it cannot measure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pretrain.core.errors import run_command
from tools.coordinate_check import main

SMALL = [
    "--recipe",
    "debug",
    "--tokens",
    "random",
    "--steps",
    "2",
    "--widths",
    "32",
    "64",
    "--set",
    "model.vocab_size=100",
]
SMALL += ["--set", "train.global_batch_size=2", "--set", "train.sequence_length=16"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["coordinate_check.py", *SMALL, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_it_measures_prints_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "plots" / "coordinates.png"
    assert run(monkeypatch, "--plot", picture, "--json", tmp_path / "result.json") == 0
    said = capsys.readouterr().out
    assert "residual" in said and "verdict" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["widths"], result["base_width"], result["tokens"]) == ([32, 64], 32, "random")
    for kind in ("standard", "mup"):
        for layer in result[kind]["layers"].values():
            assert len(layer["sizes"]) == len(layer["slopes"]) == 3 and all(
                len(sizes) == 2 for sizes in layer["sizes"]
            )


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (["--widths", "64"], "give two or more"),
        (["--widths", "8", "32"], "num_key_value_heads would be 0.5"),
        (["--plot", __file__], "is there already"),
        (["--set", "optimizer={kind: sgd, learning_rate: 0.1}"], "optimizer.kind=sgd"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said
