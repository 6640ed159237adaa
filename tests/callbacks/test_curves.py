"""training_curves.png: what is in it, and how it is smoothed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.callbacks.curves import draw_curves, moving_average


def rows(**more: float) -> list[dict[str, Any]]:
    every = {"learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_second": 5.0, **more}
    train = [{"kind": "train", "step": step, "tokens": step, "loss": 4.0 - 0.1 * step, **every} for step in range(1, 9)]
    return [*train, {"kind": "usage", "step": 8}, {"kind": "validation", "step": 8, "tokens": 8, "validation_loss": 3.0}]


def test_a_moving_average_has_no_bias_towards_zero_and_halves_weights() -> None:
    assert moving_average([3.0] * 5, 2.0) == pytest.approx([3.0] * 5)
    averages = moving_average([0.0, 0.0, 1.0], 1.0)
    assert averages == pytest.approx([0.0, 0.0, 1.0 / 1.75])
    assert moving_average([0.0, 0.0, 1.0], 100.0)[2] == pytest.approx(1 / 3, abs=0.01)  # smoothed so strongly that it is the mean


@pytest.mark.parametrize(
    "given,panels",
    [(rows(), 4), (rows(router_entropy=1.0, max_violation=0.2), 6), ([], 1)],
    ids=["dense", "moe", "no row"],
)
def test_there_is_a_panel_for_each_column_that_rows_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[dict[str, Any]], panels: int
) -> None:
    from matplotlib import pyplot

    drawn: list[Any] = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", lambda figure: drawn.append(figure))
    draw_curves(given, "run", tmp_path / "curves.png")
    (figure,) = drawn
    visible = [axes for axes in figure.axes if axes.get_visible()]
    assert len(visible) == panels
    labels = [text.get_text() for text in visible[0].get_legend().get_texts()] if given else []
    assert labels == (["train", "train, smoothed", "validation"] if given else [])
    raw = visible[0].lines[0].get_ydata() if given else []
    assert list(raw) == [row["loss"] for row in given if row["kind"] == "train"]
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"] and (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    close(figure)
