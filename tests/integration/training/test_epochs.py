"""Runs whose length is given in epochs: their steps follow from the data."""

from __future__ import annotations

import json
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.layout import complete_checkpoints, pointers, read_run_recipe
from pretrain.config.epochs import with_known_length
from pretrain.config.load import load_recipe
from pretrain.config.timeline import Timeline
from pretrain.core.errors import ConfigError
from pretrain.sweeps.axes import Point
from pretrain.sweeps.plan import PointCheck
from pretrain.sweeps.study import Design, Study, base_mapping
from pretrain.train import main
from tests.support.tiny_run import Tiny, curve, make_trainer, start_ranks

SMALL = (
    "train.train_tokens=null",
    "model.num_hidden_layers=1",
    "validation.interval_steps=0",
    "checkpoint.interval_steps=1000",
    "train.global_batch_size=64",
    "train.micro_batch_size=16",
    "schedule.warmup_steps=0",
)


def counted(tiny: Tiny, *overrides: str) -> tuple[int, int, Any]:
    """Samples an epoch as the loader counts them, steps of the run, and the trainer."""
    trainer = make_trainer(tiny, tiny.folder / "unused", *SMALL, *overrides, zero=1)
    samples = sum(len(source.samples) for source in trainer.loader.sources.values())
    return samples, trainer.timeline.num_steps, trainer


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("epochs", ["1", "2.5", "0.1"])
def test_steps_are_those_in_which_every_sequence_was_read_so_often(
    packing: str, epochs: str, tiny: Tiny
) -> None:
    overrides = (f"train.epochs={epochs}", f"data.packing.kind={packing}")
    recipe = with_known_length(load_recipe(str(tiny.recipe), [*SMALL, *overrides]))
    # Before a packing is written next to the shards, and after.
    if packing == "best_fit":
        from data_pipeline.loading.packing import prepare_packing
        from data_pipeline.shards.datasets import load_datasets

        prepare_packing(load_datasets({"": str(tiny.data)}), recipe.data, 32)
        assert with_known_length(load_recipe(str(tiny.recipe), [*SMALL, *overrides])) == recipe
    samples, steps, trainer = counted(tiny, *overrides)
    assert recipe.train.epoch_samples == samples > 64
    assert steps == ceil(Fraction(epochs) * samples / 64) == Timeline(recipe).num_steps
    assert trainer.loader.epochs(steps) >= float(epochs) > trainer.loader.epochs(steps - 1)


@pytest.mark.usefixtures("in_process")
def test_phases_share_the_epochs_and_the_last_one_takes_the_rest(tiny: Tiny) -> None:
    phases = (
        "phases=[{name: first, tokens: 2048, sequence_length: 16},"
        " {name: rest, global_batch_size: 32, micro_batch_size: 2}]"
    )
    samples, steps, trainer = counted(tiny, "train.epochs=2", phases)
    first, rest = trainer.timeline.phases
    assert (first.num_steps, first.num_tokens) == (2, 2048)
    assert rest.num_tokens // 32 == ceil((2 * samples - 64) / 32) * 32
    assert steps == first.num_steps + rest.num_steps
    with pytest.raises(ConfigError, match="leave the tokens of the last phase out"):
        counted(tiny, "train.epochs=2", "phases=[{name: all, tokens: 2048}]")
    with pytest.raises(ConfigError, match="train.epochs is 0.01, which makes .*: raise train.ep"):
        counted(tiny, "train.epochs=0.01", "phases=[{name: a, tokens: 90000}, {name: b}]")


def run_ranks(tiny: Tiny, run: Path, ranks: int, *settings: str, fault: str = "") -> list[int]:
    arguments = tiny.arguments(run, *SMALL, *settings)
    started = start_ranks(arguments, run.parent, {"FAULT": fault} if fault else {}, ranks)
    return [process.wait() for process in started]


def test_a_killed_run_of_three_epochs_continues_on_other_ranks_and_keeps_each_epoch(
    tiny: Tiny, tmp_path: Path
) -> None:
    settings = ("train.epochs=3", "checkpoint.keep_epochs=true", "schedule.kind=linear")
    # Fewer steps than of the tiny recipe's length.
    settings += ("train.sequence_length=64",)
    assert run_ranks(tiny, tmp_path / "whole", 1, *settings) == [0]
    whole = curve(tmp_path / "whole")
    newest = complete_checkpoints(tmp_path / "whole" / "checkpoints")[0]
    recipe = read_run_recipe(newest)
    samples = recipe.train.epoch_samples
    assert samples is not None and recipe.train.epochs == 3 and recipe.train.train_tokens is None
    steps = [ceil(epoch * samples / 64) for epoch in (1, 2, 3)]
    assert Timeline(recipe).num_steps == steps[-1]
    named = {f"epoch_{epoch}": f"step_{step}" for epoch, step in enumerate(steps, start=1)}
    assert pointers(tmp_path / "whole" / "checkpoints") == named | {"latest": f"step_{steps[-1]}"}
    validated = [row["step"] for row in whole if row["kind"] == "validation"]
    assert sorted(set(validated)) == steps

    run = tmp_path / "run"
    # Killed in the second epoch, after the first one's checkpoint.
    run_ranks(tiny, run, 1, *settings, fault=f"kill@step.begin:{steps[0] + 3}")
    assert pointers(run / "checkpoints")["latest"] == f"step_{steps[0]}"
    assert run_ranks(tiny, run, 2, *settings) == [0, 0]
    assert pointers(run / "checkpoints") == pointers(tmp_path / "whole" / "checkpoints")
    losses = [
        {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
        for rows in (whole, curve(run))
    ]
    assert losses[0].keys() == losses[1].keys()
    for step, loss in losses[0].items():
        assert losses[1][step] == pytest.approx(loss, rel=1e-5)


@pytest.mark.usefixtures("in_process")
def test_a_dry_run_shows_the_steps_if_there_are_data_and_what_is_unknown_if_not(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("train.epochs=2", "phases=[{name: a, tokens: 4096}, {name: b}]")
    arguments = tiny.arguments(tmp_path / "run", *SMALL, *settings)
    assert main([*arguments, "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 epochs of" in shown and "phases" in shown
    assert main([*arguments, "--dry-run", "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)
    samples, steps, _ = counted(tiny, *settings)
    assert plan["steps"] == steps and plan["recipe"]["train"]["epoch_samples"] == samples

    missing = [*arguments, "--set", f"data.path={tmp_path}/none", "--set", "model.vocab_size=300"]
    assert main([*missing, "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "not known before there are data" in shown
    assert main([*missing, "--dry-run", "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] is None and plan["train_tokens"] is None and plan["phases"] == []
    assert plan["estimated_seconds"] is None and plan["recipe"]["train"]["epoch_samples"] is None
    assert plan["parameters_total"] > 0 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.epochs=2"], "train_tokens and epochs are both given: the run's length is one"),
        (["train.train_tokens=null"], "train_tokens is missing: the run's length is one of the"),
        (["train.epoch_samples=5"], "epoch_samples belongs to epochs"),
        ([*SMALL, "train.epochs=1", "data.streaming=true"], "a stream .data.streaming. has not"),
        (
            [*SMALL, "train.epochs=1", "data.mixture={kind: tokens, tokens: {all: 4096}}"],
            "says how long the run is, and so does train.epochs",
        ),
        (["schedule={kind: cosine, warmup_steps: 2, warmup_share: 0.1}"], "not both"),
    ],
)
def test_one_number_says_how_long_a_run_is(overrides: list[str], sentence: str, tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_recipe(str(tiny.recipe), overrides)


@pytest.mark.usefixtures("in_process")
def test_a_warm_up_may_be_a_share_of_the_steps(tiny: Tiny) -> None:
    overrides = ("train.epochs=2", "schedule={kind: linear, warmup_share: 0.1}")
    _, steps, trainer = counted(tiny, *overrides)
    warmup = round(0.1 * steps)
    assert warmup > 1
    factors = [trainer.schedules.at(step)[0] for step in range(steps)]
    same = load_recipe("debug", [f"schedule={{kind: linear, warmup_steps: {warmup}}}"]).schedule
    assert factors == [same.factor(step, steps) for step in range(steps)]
    with pytest.raises(ConfigError, match=r"is longer than the run .*: lower it or raise train.ep"):
        counted(tiny, "train.epochs=1", "schedule={kind: linear, warmup_steps: 100000}")


def test_runs_of_a_sweep_have_the_steps_of_their_data_or_the_tokens_that_were_asked_for(
    tiny: Tiny, tmp_path: Path
) -> None:
    def study(*overrides: str, tokens: int | None = None) -> Study:
        settings = [*SMALL, "train.epochs=2", *overrides]
        design = Design(
            kind="sweep",
            recipe=str(tiny.recipe),
            base=base_mapping(str(tiny.recipe), settings, tokens),
            axes={},
            search="grid",
            trials=0,
            search_seed=0,
            seeds=[],
            train_tokens=tokens,
            ranks=1,
            ds_config={},
            folder=str(tmp_path),
        )
        return Study(tmp_path / "sweep", design, [])

    point = Point("base", {}, [], run="base")
    recipe = with_known_length(load_recipe(str(tiny.recipe), [*SMALL, "train.epochs=2"]))
    assert study().num_steps(point) == Timeline(recipe).num_steps > 2
    assert study(tokens=2 * 64 * 32).num_steps(point) == 2
    assert PointCheck(study())(point).train.epochs == 2
    with pytest.raises(ConfigError, match="is longer than the run"):
        PointCheck(study("schedule.warmup_steps=100000"))(point)
