"""A published curve is drawn with a run's own, and read strictly."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from pretrain.callbacks.curves import figure_of
from pretrain.callbacks.published import BY_STEP, BY_TOKENS, PublishedEvents, overlay_of
from pretrain.config.load import load_recipe
from pretrain.config.published import PublishedConfig, read_published
from pretrain.config.timeline import Timeline
from pretrain.core.errors import ConfigError
from pretrain.core.shipped import recipe_names
from pretrain.engine.monitor import TRAIN_LOSS

HEAD = "step,train_loss,validation_loss\n"


def records(steps: int, tokens_per_step: int) -> list[dict[str, Any]]:
    return [
        {"kind": "train", "step": step, "tokens": step * tokens_per_step, "loss": 9.0 - step / 1e4}
        for step in range(100, steps + 1, 100)
    ]


def test_h64lm_has_its_curve_and_small_copies_have_none() -> None:
    recipe = load_recipe("h64lm")
    assert recipe.published is not None
    points = {point.step: point[1:] for point in read_published(recipe.published)}
    assert points == {
        399: (7.49, 5.72), 1994: (3.95, 4.0), 3988: (3.01, 3.7), 5981: (2.16, 3.96),
        7975: (1.54, 4.32),
    }  # fmt: skip
    assert Timeline(recipe).num_steps == 7975
    fast = load_recipe("fastgpt_moe").published
    assert fast is not None
    assert [(step, loss) for step, loss, _ in read_published(fast)] == [
        (0, 11.85), (400, 8.0), (10_000, 5.2), (20_000, 4.85), (40_000, 4.6), (103_000, 4.5),
    ]  # fmt: skip
    with_curve = {name for name in recipe_names() if load_recipe(name).published is not None}
    assert with_curve == {"h64lm", "h64lm_tied", "fastgpt_moe"}


def test_it_is_drawn_in_the_panel_of_the_loss_up_to_the_runs_own_tokens() -> None:
    recipe = load_recipe("h64lm")
    per_step = recipe.train.tokens_per_step
    overlay = overlay_of(recipe, Timeline(recipe))
    figure = figure_of(records(4000, per_step), "run", overlay)
    axes = figure.axes[0]
    legend = axes.get_legend()
    assert legend is not None and axes.get_title(loc="left") == BY_STEP
    assert [text.get_text() for text in legend.get_texts()] == [
        "train",
        "train, smoothed",
        "H64LM, published: train",
        "H64LM, published: validation",
    ]
    assert list(axes.lines[3].get_ydata()) == [5.72, 4.0, 3.7, 3.96, 4.32]
    assert list(axes.lines[3].get_xdata())[2] == 3988 * per_step
    # The run's own axis: the later half of the published curve is outside of it.
    assert 4000 * per_step <= axes.get_xlim()[1] < 4300 * per_step
    # A run without any record has nothing to compare.
    assert figure_of([], "run", overlay).axes[0].get_legend() is None


def test_points_are_placed_at_the_published_tokens_if_these_are_known(tmp_path: Path) -> None:
    (tmp_path / "curve.csv").write_text(HEAD + "10,5.0,\n20,,4.0\n")
    given = f"published={{curve: {tmp_path / 'curve.csv'}, source: 'a $1 run', tokens_per_step: 7}}"
    recipe = load_recipe("debug", [given])
    overlay = overlay_of(recipe, Timeline(recipe))
    assert overlay is not None and overlay.note == BY_TOKENS
    assert overlay.points("train") == [(70, 5.0)]
    assert overlay.points("validation") == [(140, 4.0)]
    # A dollar is no formula: the picture can be written.
    figure_of(records(200, 1), "run", overlay).savefig(io.BytesIO(), format="png")


def test_tensorboard_has_it_as_runs_of_their_own_in_the_chart_of_the_loss(tmp_path: Path) -> None:
    recipe = load_recipe("fastgpt_moe")
    overlay = overlay_of(recipe, Timeline(recipe))
    assert overlay is not None
    with SummaryWriter(str(tmp_path)) as writer:
        # A second start writes it anew, not once more.
        for _ in range(2):
            PublishedEvents(overlay, writer).on_start(0, 1)
    events = EventAccumulator(str(tmp_path / "published_train")).Reload().Scalars(TRAIN_LOSS)
    assert [event.step for event in events] == [0, 400, 10_000, 20_000, 40_000, 103_000]
    assert events[0].value == pytest.approx(11.85)
    PublishedEvents(overlay, None).on_start(0, 1)


@pytest.mark.parametrize(
    "content,said",
    [
        (None, "there is no file"),
        (b"", "the first line"),
        (b"step,loss\n1,2\n", "the first line"),
        (HEAD.encode(), "has no points"),
        (HEAD.encode() + b"1,2\n", "line 2"),
        (HEAD.encode() + b"1,2,x\n", "line 2"),
        (HEAD.encode() + b"1,nan,\n", "line 2"),
        (HEAD.encode() + b"-1,2,\n", "line 2"),
        (HEAD.encode() + b"5,2,\n\n5,2,\n", "line 4"),
        (HEAD.encode() + b"9" * 30 + b",2,\n", "line 2"),
        (b"\xff\xfe\x00", "no CSV in UTF-8"),
        (HEAD.encode() + b"x" * 10_000_001, "thin it out"),
    ],
)
def test_a_file_that_is_no_curve_is_refused_in_one_sentence(
    content: bytes | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "curve.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        read_published(PublishedConfig(curve=str(path), source="x"))
    assert "\n" not in str(caught.value)


def test_a_run_with_a_wrong_curve_ends_before_it_starts() -> None:
    from pretrain.train import main

    arguments = ["--recipe", "debug", "--dry-run", "--set", "published={curve: nowhere, source: x}"]
    with pytest.raises(ConfigError, match=r"there is no file nowhere: .*fastgpt_moe, h64lm"):
        main(arguments)
