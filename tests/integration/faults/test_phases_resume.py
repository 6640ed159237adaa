"""Runs with phases: interrupted, branched, resumed with other phases, read by every tool."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.layout import read_recipe, read_run_recipe, read_state
from pretrain.checkpoint.weights import load_model
from pretrain.config.load import load_recipe
from pretrain.config.timeline import Timeline
from pretrain.core.errors import PREEMPTED, ConfigError
from pretrain.evaluation.heldout.heldout import score_checkpoint
from pretrain.model.decoder import DecoderLM
from pretrain.run.lr_finder import prepare
from pretrain.train import main
from tests.support.tiny_run import Tiny, curve

Command = Callable[[list[str]], tuple[int, str]]
# Batch warm-up, longer sequences on another base, better data with a decay and a frozen router:
# steps 1 to 4, 5 to 7, and 8 to 11.
WARM = "{name: warm, tokens: 384, global_batch_size: 4}"
LONG = (
    "{name: long, tokens: 768, sequence_length: 64, global_batch_size: 4, micro_batch_size: 1,"
    " position: {rope_theta: 500}}"
)
BETTER = (
    "mixture: {kind: weights, weights: {one: 1, two: 3}}, frozen: [router], schedule: {kind: sqrt}"
)
THREE = f"phases=[{WARM}, {LONG}, {{name: anneal, {BETTER}}}]"


def arguments_for(tiny: Tiny, run: Path, *overrides: str, tokens: int = 1920) -> list[str]:
    datasets = f"data.corpora={{one: {tiny.data}, two: {tiny.data}}}"
    settings = [
        "data.path=null",
        datasets,
        f"train.train_tokens={tokens}",
        "checkpoint.keep_last=20",
        "checkpoint.interval_steps=5",
    ]
    return tiny.arguments(run, *settings, *overrides)


def weights_of(run: Path, step: int) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in (run / "checkpoints" / f"step_{step}").glob("weights-*.safetensors")
    }


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run; tests only read it."""
    from tests.support.tiny_run import own_process

    run = tmp_path_factory.mktemp("whole") / "run"
    with own_process():
        assert main(arguments_for(tiny, run, THREE)) == 0
    return run


def in_step(
    patch: pytest.MonkeyPatch,
    recipe_arguments: list[str],
    run: Path,
    step: int,
    act: Callable[[], None],
) -> None:
    """``act`` while the first micro batch of ``step`` (from 1) of the run is computed."""
    overrides = [value for flag, value in pairwise(recipe_arguments) if flag == "--set"]
    timeline = Timeline(load_recipe(recipe_arguments[1], overrides))
    latest = run / "checkpoints" / "latest"
    begun = int(latest.read_text().removeprefix("step_")) if latest.exists() else 0
    sizes = [timeline.at(number).recipe.train for number in range(begun, step - 1)]
    number = sum(size.global_batch_size // size.micro_batch_size for size in sizes) + 1
    forward, seen = DecoderLM.forward, []

    def interrupted(model: DecoderLM, *inputs: Any) -> Any:
        if model.training:
            seen.append(None)
            if len(seen) == number:
                act()
        return forward(model, *inputs)

    patch.setattr(DecoderLM, "forward", interrupted)


def die() -> None:
    raise KeyboardInterrupt


def test_interrupted_and_killed_in_every_phase_the_end_is_bitwise_the_same(
    tiny: Tiny, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # A kill ends the writing thread too; this process, and the thread with it, continues.
    arguments = arguments_for(tiny, run, THREE, "checkpoint.background=false")
    for step, killed in ((2, False), (3, True), (6, True), (6, False), (9, True), (10, False)):
        with pytest.MonkeyPatch.context() as patch:
            in_step(
                patch,
                arguments,
                run,
                step,
                die if killed else lambda: signal.raise_signal(signal.SIGTERM),
            )
            if killed:
                with pytest.raises(KeyboardInterrupt):
                    main(arguments)
            else:
                assert main(arguments) == PREEMPTED
                assert (run / "checkpoints" / "latest").read_text() == f"step_{step}\n"
    assert main(arguments) == 0
    assert curve(run) == curve(whole)
    assert weights_of(run, 11) == weights_of(whole, 11) != weights_of(whole, 10)


def test_rows_and_checkpoints_say_which_phase_they_belong_to(whole: Path) -> None:
    rows = [row for row in curve(whole) if row["kind"] == "train"]
    assert [row["phase"] for row in rows] == ["warm"] * 4 + ["long"] * 3 + ["anneal"] * 4
    assert [row["tokens"] for row in rows] == [
        128,
        256,
        384,
        512,
        768,
        1024,
        1280,
        1536,
        1792,
        2048,
        2304,
    ]
    assert rows[7]["learning_rate"] == 3e-3 and rows[10]["learning_rate"] == pytest.approx(
        3e-3 * (1 - 0.75**0.5)
    )
    # Every phase ends with a validation and a checkpoint.
    assert {4, 7, 11} <= {row["step"] for row in curve(whole) if row["kind"] == "validation"}
    states = {
        step: read_state(whole / "checkpoints" / f"step_{step}") for step in (4, 5, 7, 10, 11)
    }
    assert [state["phase"] for state in states.values()] == [
        "warm",
        "long",
        "long",
        "anneal",
        "anneal",
    ]
    assert states[10]["consumed_tokens"] == 2048
    with (whole / "training_log.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["phase"] == "warm"


def test_a_router_that_is_frozen_keeps_every_bit_and_the_other_weights_move(whole: Path) -> None:
    before, after = (
        load_model(whole / "checkpoints" / f"step_{step}")[0].state_dict() for step in (7, 11)
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    routers = {name for name in before if ".router." in name}
    assert routers and moved == before.keys() - routers


@pytest.mark.parametrize(
    ("step", "theta", "length"), [(4, 10000, 32), (7, 500, 64), (11, 10000, 32)]
)
def test_readers_see_the_model_as_it_is_at_the_checkpoints_step(
    step: int, theta: int, length: int, whole: Path
) -> None:
    checkpoint = whole / "checkpoints" / f"step_{step}"
    recipe = read_recipe(checkpoint)
    assert recipe.phases == [] and len(read_run_recipe(checkpoint).phases) == 3
    assert recipe.model.position.rope_theta == theta and recipe.train.sequence_length == length
    model, _ = load_model(checkpoint)
    assert model.position.theta == theta
    if step == 11:  # its validation read everything, as the tool does
        score = score_checkpoint(
            checkpoint, None, "validation", torch.device("cpu"), baselines=("unigram",)
        )
        assert score.loss == pytest.approx(read_state(checkpoint)["validation_loss"], rel=1e-5)
        assert score.window == length


def trunk_arguments(tiny: Tiny, run: Path, *overrides: str, steps: int = 6) -> list[str]:
    return tiny.arguments(
        run,
        "checkpoint.keep_last=9",
        "schedule={kind: constant, warmup_steps: 2}",
        *overrides,
        steps=steps,
    )


DECAY = "phases=[{name: trunk, tokens: 768}, {name: decay, schedule: {kind: linear}}]"


@pytest.fixture(scope="module")
def trunk(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of constant learning rate, with a checkpoint of step 3."""
    from tests.support.tiny_run import own_process

    run = tmp_path_factory.mktemp("trunk") / "run"
    with own_process():
        assert main(trunk_arguments(tiny, run)) == 0
    return run


def test_a_branch_is_the_run_that_decays_from_there(
    tiny: Tiny, trunk: Path, tmp_path: Path, train: Command
) -> None:
    start = f"branch_from={trunk / 'checkpoints' / 'step_3'}"
    branch, straight = tmp_path / "branch", tmp_path / "straight"
    with pytest.MonkeyPatch.context() as patch:
        in_step(
            patch,
            trunk_arguments(tiny, branch, DECAY),
            branch,
            2,
            lambda: signal.raise_signal(signal.SIGTERM),
        )
        assert train(trunk_arguments(tiny, branch, DECAY, start))[0] == PREEMPTED
    assert (branch / "checkpoints" / "latest").read_text() == "step_5\n"
    # Resumed, it does not look at the parent run again.
    assert train(trunk_arguments(tiny, branch, DECAY, "branch_from=nowhere"))[0] == 0
    assert train(trunk_arguments(tiny, straight, DECAY))[0] == 0
    assert weights_of(branch, 6) == weights_of(straight, 6) != weights_of(trunk, 6)
    rows = [
        [(row["step"], row["loss"]) for row in curve(run) if row["kind"] == "train"]
        for run in (branch, straight, trunk)
    ]
    assert rows[0] == rows[1][3:] and rows[1][:3] == rows[2][:3] and rows[0] != rows[2][3:]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["seed=8"], ["branch_from: ", "another seed (7 -> 8)"]),
        (
            [DECAY.replace("tokens: 768", "tokens: 512, global_batch_size: 4")],
            ["another train.global_batch_size in the phase 'trunk' (8 -> 4)"],
        ),
        ([DECAY.replace("tokens: 768", "tokens: 512")], ["another schedule in the phase 'decay'"]),
        (
            [DECAY.replace("tokens: 768", "tokens: 768, frozen: [router]")],
            ["another frozen in the phase 'trunk'"],
        ),
        (
            ["train.train_tokens=768", "phases=[]"],
            ["is at step 3, and the recipe ends after 3: raise train.train_tokens"],
        ),
    ],
)
def test_a_branch_whose_past_is_not_the_trunks_is_refused(
    overrides: list[str], parts: list[str], tiny: Tiny, trunk: Path, tmp_path: Path, train: Command
) -> None:
    start = f"branch_from={trunk / 'checkpoints' / 'step_3'}"
    code, message = train(trunk_arguments(tiny, tmp_path / "run", DECAY, start, *overrides))
    assert code == 2 and all(part in message for part in parts), message


def test_a_branch_from_nothing_or_from_a_damaged_checkpoint_is_refused(
    tiny: Tiny, tmp_path: Path, train: Command
) -> None:
    code, message = train(
        trunk_arguments(tiny, tmp_path / "run", DECAY, f"branch_from={tmp_path / 'step_3'}")
    )
    assert code == 4 and "there is no checkpoint" in message


def test_the_plan_of_a_branch_looks_at_its_trunk_and_leaves_out_its_steps(
    tiny: Tiny, trunk: Path, tmp_path: Path, train: Command
) -> None:
    start, result = f"branch_from={trunk / 'checkpoints' / 'step_3'}", tmp_path / "plan.json"

    def planned(*overrides: str) -> tuple[int, str]:
        arguments = trunk_arguments(
            tiny, tmp_path / "run", DECAY, "train.precision=auto", *overrides
        )
        return train(
            [*arguments, "--dry-run", "--gpu", "H100", "--world-size", "1", "--json", str(result)]
        )

    assert planned()[0] == 0
    straight = json.loads(result.read_text())
    assert planned(start)[0] == 0
    branch = json.loads(result.read_text())
    assert (straight["first_step"], branch["first_step"], branch["steps"]) == (0, 3, 6)
    assert branch["estimated_seconds"] == pytest.approx(straight["estimated_seconds"] / 2)
    code, message = planned("branch_from=nowhere/step_3")
    assert code == 4 and "there is no checkpoint nowhere/step_3" in message
    code, message = planned(start, "seed=8")
    assert code == 2 and "another seed (7 -> 8)" in message
    with pytest.raises(ConfigError, match=r"branch_from=null --set initial_weights=.*step_3"):
        prepare(load_recipe(str(tiny.recipe), [start]), {}, "zero1.json", 20)


def test_what_is_past_must_be_as_it_was_and_what_is_ahead_may_change(
    tiny: Tiny, tmp_path: Path, train: Command
) -> None:
    run = tmp_path / "run"
    assert train(trunk_arguments(tiny, run, steps=4))[0] == 0
    # A run without phases continues with phases ahead, once they say what it was.
    late = "{name: late, frozen: [embedding], global_batch_size: 4}"
    code, message = train(
        trunk_arguments(tiny, run, f"phases=[{{name: early, tokens: 512}}, {late}]", steps=6)
    )
    assert (
        code == 2
        and f"{run} holds a run with another train.global_batch_size in the phase 'late' (8 -> 4)"
        in message
    )
    assert (
        train(
            trunk_arguments(tiny, run, f"phases=[{{name: early, tokens: 1024}}, {late}]", steps=6)
        )[0]
        == 0
    )
    assert json.loads((run / "summary.json").read_text())["steps"] == 8
    code, message = train(
        trunk_arguments(
            tiny,
            run,
            f"phases=[{{name: early, tokens: 1024}}, {late}]",
            "phases.1.frozen=[head]",
            steps=7,
        )
    )
    assert code == 2 and "another frozen in the phase 'late' (['embedding'] -> ['head'])" in message
    code, message = train(
        trunk_arguments(
            tiny, run, "phases=[{name: a, tokens: 1024}, {name: b, frozen: [hed]}]", steps=7
        )
    )
    assert (
        code == 2 and "phases.b.frozen names 'hed'" in message and "did you mean 'head'" in message
    )


def test_losses_of_another_length_are_no_better_and_no_worse(tiny: Tiny, whole: Path) -> None:
    # Of the last step there are two: the sample's, which competes, and then that of the whole
    # split.
    rows = {
        row["step"]: row["validation_loss"]
        for row in reversed(curve(whole))
        if row["kind"] == "validation"
    }
    for step, same_length in ((7, (5, 6, 7)), (11, (8, 9, 10, 11))):
        progress = read_state(whole / "checkpoints" / f"step_{step}")["progress"]
        assert progress["best_validation"] == min(
            rows[near] for near in same_length if near in rows
        )
