"""tools/expert_usage.py: tables, trend, picture and JSON of a run's windows, and its errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from pretrain.analysis.expert_usage import UsageWindow, load_window, save_window, usage_columns
from pretrain.core.errors import BAD_DATA, DONE, USAGE, run_command
from tests.support.paths import TOOLS
from tools.expert_usage import main

TOOL = TOOLS / "expert_usage.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with windows of steps 100 to 3000, less and less even, of layers 1 and 3."""
    folder, source = tmp_path_factory.mktemp("tool") / "run", np.random.default_rng(0)
    for step in range(100, 3001, 100):
        shares = source.dirichlet(np.full(600, 300 / step), size=2)
        save_window(
            folder / "usage",
            UsageWindow(step, 100, [1, 3], source.multinomial(100_000, shares).astype(np.int64)),
        )
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    return int(ended.value.code or 0)


def test_the_newest_window_its_trend_and_a_picture(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, run, "--plot", tmp_path / "usage.png", "--json", "-") == DONE
    result = json.loads(capsys.readouterr().out)
    columns = usage_columns(load_window(run / "usage" / "step_003000.npz"), 5.0)
    assert {name: result[name] for name in columns} == columns
    assert (result["step"], result["steps"], result["experts"], result["hot_factor"]) == (
        3000,
        100,
        600,
        5.0,
    )
    trend = [row["step"] for row in result["trend"]]
    assert (
        len(trend) == 20 and trend[0] == 100 and trend[-1] == 3000 and trend == sorted(set(trend))
    )
    assert result["trend"][0]["gini"] < result["trend"][-1]["gini"] == result["gini"]
    assert [path.name for path in tmp_path.iterdir()] == ["usage.png"]
    assert (tmp_path / "usage.png").read_bytes().startswith(b"\x89PNG")


def test_tables_of_one_window_and_layer(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--step",
        "200",
        "--layer",
        "3",
        "--hot-factor",
        "2",
        "--plot",
        tmp_path / "new" / "usage.png",
        "--json",
        tmp_path / "usage.json",
    )
    assert call(monkeypatch, run, *options) == DONE
    result, shown = json.loads((tmp_path / "usage.json").read_text()), capsys.readouterr().out
    assert result["step"] == 200 and [layer["layer"] for layer in result["layers"]] == [3]
    (layer,) = result["layers"]
    for text in (
        "600 experts a layer, 100 steps up to step 200",
        "hot (> 2x)",
        f"{layer['gini']:.4f}",
        f"{layer['hottest'][0]} (",
    ):
        assert text in shown
    assert (tmp_path / "new" / "usage.png").stat().st_size > 10_000


def test_a_file_by_itself_has_no_trend(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, run / "usage" / "step_000300.npz", "--json", "-") == DONE
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 300 and result["trend"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["RUN/nowhere"], USAGE, "nowhere is not there: give a run's folder"),
        (["RUN/usage"], USAGE, "has no windows of expert usage"),
        (
            ["RUN", "--step", "270"],
            USAGE,
            "no window that ends with step 270: the nearest is --step 300, the newest 3000",
        ),
        (["RUN", "--layer", "2"], BAD_DATA, "has no layer 2: its layers of experts are 1, 3"),
        (["RUN", "--hot-factor", "0"], USAGE, "--hot-factor is 0: give a number above 0"),
        (["RUN/usage/step_000100.npz", "--step", "100"], USAGE, "is one window: leave it out"),
        (
            ["RUN", "--plot", "RUN/usage/step_000100.npz"],
            USAGE,
            "is there already: choose another --plot path",
        ),
        ([str(TOOL)], BAD_DATA, "holds no expert usage, or is damaged"),
    ],
)
def test_errors_are_one_sentence(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    sentence: str,
) -> None:
    assert call(monkeypatch, *(argument.replace("RUN", str(run)) for argument in arguments)) == code
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error: ") and sentence in told[0]
