"""The learning rate finder on the real engine: the training's own numbers, one picture, and nothing
else touched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain.train
from pretrain.core.errors import ConfigError
from pretrain.model.decoder import DecoderLM
from tests.support.paths import ROOT
from tests.support.tiny_run import Started, Tiny, curve, make_tiny, own_process
from tools import find_learning_rate

Find = Callable[..., dict[str, Any]]
RANGE = ("--from", "1e-3", "--to", "10", "--steps", "30")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def in_process() -> Iterator[None]:
    with own_process():
        yield


@pytest.fixture
def find(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Find:
    """Runs the tool inside this process on the run folder ``run`` and returns its JSON."""

    def call(*arguments: str) -> dict[str, Any]:
        result = tmp_path / "result.json"
        command = [
            "find_learning_rate.py",
            "--recipe",
            str(tiny.recipe),
            "--set",
            f"run_path={tmp_path / 'run'}",
            "--json",
            str(result),
            *arguments,
        ]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(find_learning_rate, "disconnect", lambda: None)
        assert find_learning_rate.main() == 0
        content: dict[str, Any] = json.loads(result.read_text())
        return content

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_it_trains_as_the_run_would_and_touches_nothing_of_it_but_its_picture(
    tiny: Tiny, find: Find, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert pretrain.train.main(tiny.arguments(run, steps=2)) == 0
    before = contents(run)
    assert any(name.startswith("checkpoints/step_2/") for name in before)
    result = find(*RANGE)
    after = contents(run)
    assert set(after) - set(before) == {"learning_rate.png"} and before.items() <= after.items()
    assert after["learning_rate.png"].startswith(b"\x89PNG")
    assert result["losses"][0] == next(row["loss"] for row in curve(run) if row["kind"] == "train")
    assert (
        result["diverged"] is not None
        and result["diverged"] > 0.03
        and min(result["losses"]) < 0.8 * result["losses"][0]
    )
    assert result["suggestion"] == min(result["steepest"], 0.1 * result["diverged"])
    assert (
        f"suggested learning rate {result['suggestion']:.2g} (the recipe has 0.003)"
        in capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match=r"learning_rate.png is there already: add --overwrite"):
        find(*RANGE)
    short = find("--from", "1e-7", "--to", "1e-6", "--steps", "20", "--overwrite")
    assert (
        short["diverged"] is None
        and len(short["losses"]) == 20
        and contents(run)["learning_rate.png"] != after["learning_rate.png"]
    )


def test_at_the_runs_learning_rate_it_is_the_run_with_its_phases_frozen_parts_and_balancing(
    tiny: Tiny, find: Find, tmp_path: Path
) -> None:
    settings = [
        (
            "phases=[{name: small, tokens: 1280, global_batch_size: 4, sequence_length: 16, frozen:"
            " [embedding, head]}, {name: rest}]"
        ),
        (
            "model.moe={kind: dropless, num_experts: 4, top_k: 2, moe_intermediate_size: 16,"
            " bias_balancing: {update_rate: 0.05}}"
        ),
        "schedule={kind: constant, warmup_steps: 0}",
        "model.num_hidden_layers=1",
    ]
    quick = ("validation.interval_steps=100", "checkpoint.interval_steps=100")
    assert pretrain.train.main(tiny.arguments(tmp_path / "run", *settings, *quick, steps=6)) == 0
    overrides = [part for setting in settings for part in ("--set", setting)]
    result = find(
        *overrides,
        "--set",
        f"train.train_tokens={6 * 256}",
        "--from",
        "3e-3",
        "--to",
        "3.0000001e-3",
        "--steps",
        "21",
    )
    expected = [row["loss"] for row in curve(tmp_path / "run") if row["kind"] == "train"]
    assert len(expected) == 21 and result["losses"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "arguments,told",
    [
        (("--from", "1", "--to", "0.1"), "the first must be above 0"),
        (("--from", "0"), "above 0"),
        (("--steps", "5"), "take at least 20"),
    ],
)
def test_a_range_that_is_none_is_refused_before_anything_starts(
    find: Find, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        find(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_first_loss_that_is_not_finite_is_told_in_a_sentence(
    tiny: Tiny, find: Find, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = DecoderLM.forward

    def poisoned(*inputs: Any) -> Any:
        output = forward(*inputs)
        return output._replace(loss=output.loss * torch.nan, nll=output.nll * torch.nan)

    monkeypatch.setattr(DecoderLM, "forward", poisoned)
    result = find(*RANGE)
    assert result["suggestion"] is None and result["losses"] == []
    assert (
        "no suggestion: at the first step already, at 0.001, the loss or its gradient is not finite"
        in capsys.readouterr().out
    )


@pytest.mark.full
def test_two_ranks_through_the_launcher_see_the_losses_of_one_process(
    tiny: Tiny, find: Find, tmp_path: Path
) -> None:
    alone = find("--from", "1e-5", "--to", "1e-2", "--steps", "20")
    arguments = [
        "--recipe",
        tiny.recipe,
        "--set",
        f"run_path={tmp_path / 'two'}",
        "--set",
        "parallel.ep_size=2",
        "--from",
        "1e-5",
        "--to",
        "1e-2",
    ]
    command = [
        "deepspeed",
        "--num_accelerators",
        "2",
        "--master_port",
        "29733",
        ROOT / "tools" / "find_learning_rate.py",
        *arguments,
        "--steps",
        "20",
    ]
    started = Started([*command, "--json", tmp_path / "two.json"], tmp_path)
    assert started.wait() == 0, started.stderr
    result = json.loads((tmp_path / "two.json").read_text())
    assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["learning_rate.png"]
    assert started.survivors() == []
