"""Whole runs in which something goes wrong: what is reported, what is done, how they end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.shards.inspection import documents
from data_pipeline.shards.manifest import load_manifest
from pretrain.checkpoint.layout import complete_checkpoints
from pretrain.checkpoint.weights import load_state_dict
from pretrain.core.errors import GuardError, NonFiniteError
from pretrain.train import main
from pretrain.training.trainer import Trainer
from tests.support.fault_injection import Injection, poison_batches
from tests.support.tiny_run import Tiny, curve, make_trainer

pytestmark = pytest.mark.usefixtures("in_process")
SMALL = (
    "model.num_hidden_layers=1",
    "validation.interval_steps=100",
    "checkpoint.interval_steps=100",
)
SPIKE = "guards.spike={action: ACTION, window_steps: 16, min_rise: 2.0}"


def incidents(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "incidents.jsonl").read_text().splitlines()]


def started(tiny: Tiny, run: Path, *overrides: str, zero: int = 1, steps: int = 5) -> Trainer:
    run.mkdir(exist_ok=True)
    trainer = make_trainer(tiny, run, *SMALL, *overrides, zero=zero, steps=steps)
    newest = trainer.checkpoints.store.newest()
    if newest is not None:
        trainer.resume(newest)
    return trainer


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_state_dict(complete_checkpoints(run / "checkpoints")[0])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_that_is_not_finite_is_named_with_its_documents_and_skipped(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = started(tiny, tmp_path, "checkpoint.interval_steps=3", steps=6)
    poison_batches(trainer, Injection(trainer.engine, 0, 2, "expert"), {2})
    assert trainer.fit()
    (entry,) = incidents(tmp_path)
    (micro_batch,) = entry["micro_batches"]
    assert (entry["guard"], entry["action"], entry["step"], entry["grad_norm"]) == (
        "non_finite",
        "skip",
        3,
        None,
    )
    assert (micro_batch["rank"], micro_batch["micro_batch"]) == (0, 2) and "experts" in micro_batch[
        "not_finite"
    ]
    assert trainer.progress.skipped_steps == 1 and trainer.progress.skipped_in_a_row == 0
    rows = {row["step"]: row for row in curve(tmp_path) if row["kind"] == "train"}
    # The skipped step has no row of its own: there was nothing to average. At its number nothing is
    # saved either.
    assert list(rows) == [1, 2, 4, 5, 6] and [row["skipped_steps"] for row in rows.values()] == [
        0,
        0,
        1,
        1,
        1,
    ]
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["step_6"]
    shown = capsys.readouterr().err
    assert (
        "warning: step 3: its loss or gradient is not finite; rank 0, micro batch 2" in shown
        and "the step is skipped" in shown
    )
    assert shown.count("warning: step") == 1

    # The documents that are named hold the tokens that the micro batch had.
    batch = trainer.loader.step_batches(2)[2]
    manifest = load_manifest(tiny.data)
    for described, inputs in zip(
        micro_batch["sequences"], batch.input_ids_BS.tolist(), strict=True
    ):
        source, rest = described.split(": ")
        numbers = [int(word) for word in rest.split(" in ")[0].split() if word.isdigit()]
        assert str(tiny.data) in rest
        named = list(documents(manifest, "train", list(range(numbers[0], numbers[-1] + 1))))
        assert {found.source for found in named} == {source}
        tokens = [token for found in named for token in found.tokens.tolist()]
        assert any(tokens[start : start + len(inputs)] == inputs for start in range(len(tokens)))


@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_a_loss_that_is_not_finite_is_never_learned_from_though_its_gradient_is(
    zero: int, precision: str, tiny: Tiny, tmp_path: Path
) -> None:
    trainer = started(
        tiny, tmp_path, f"train.precision={precision}", "logging.interval_steps=4", zero=zero
    )
    poison_batches(trainer, Injection(trainer.engine, 0, 1, "loss_alone"), {2})
    assert trainer.fit() and trainer.progress.skipped_steps == 1
    (entry,) = incidents(tmp_path)
    assert (entry["guard"], entry["step"]) == ("non_finite", 3)
    assert [(found["micro_batch"], found["not_finite"]) for found in entry["micro_batches"]] == [
        (1, "loss")
    ]


def test_what_does_not_happen_again_is_laid_to_the_hardware(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = started(tiny, tmp_path)
    injection = Injection(trainer.engine, 0, 0, "dense")
    poison_batches(trainer, injection, {1})
    after_step = trainer.guards.after_step

    def once(*given: Any) -> Any:
        injection.armed = False
        return after_step(*given)

    trainer.guards.after_step = once
    assert trainer.fit()
    assert incidents(tmp_path)[0]["micro_batches"] == []
    assert (
        "it did not happen again when the step was repeated: suspect the hardware"
        in capsys.readouterr().err
    )


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_no_good_checkpoint_is_lost(
    tiny: Tiny, tmp_path: Path
) -> None:
    trainer = started(
        tiny, tmp_path, "guards.max_skipped_in_a_row=3", "checkpoint.interval_steps=1", steps=12
    )
    poison_batches(trainer, Injection(trainer.engine, 0, 0, "loss"), set(range(4, 12)))
    with pytest.raises(
        NonFiniteError,
        match=(
            "4 steps in a row up to step 8 were skipped, the last one because its loss or gradient"
            " is not finite"
        ),
    ):
        trainer.fit()
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == [
        "step_4",
        "step_3",
    ]
    assert [entry["step"] for entry in incidents(tmp_path)] == [5, 6, 7, 8]


def test_a_guard_may_stop_at_the_first_step_that_is_not_finite(tiny: Tiny, tmp_path: Path) -> None:
    trainer = started(tiny, tmp_path, "guards.non_finite.action=stop")
    poison_batches(trainer, Injection(trainer.engine, 0, 0, "loss"), {2})
    with pytest.raises(
        NonFiniteError,
        match="step 3: its loss or gradient is not finite, and guards.non_finite.action is stop",
    ):
        trainer.fit()


@pytest.mark.parametrize("action", ["warn", "skip", "stop"])
def test_a_spike_is_told_skipped_or_ends_the_run(
    action: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = started(tiny, tmp_path / "plain", "train.micro_batch_size=4", steps=20)
    without = Injection(plain.engine, 0, 1, "loss", factor=6.0)
    if action != "warn":  # the run to compare with never takes that step
        train_step = plain.engine.train_step
        plain.engine.train_step = lambda *given: train_step(
            *given[:3], (lambda loss, norm: True) if plain.progress.step == 17 else None
        )
    else:
        poison_batches(plain, without, {17})
    assert plain.engine.recipe.guards.spike is not None
    if action != "stop":
        plain.guards.incidents.report_step = lambda *given: None
        plain.guards.after_losses = lambda *given: None
        assert plain.fit()
    trainer = started(
        tiny,
        tmp_path / "run",
        "train.micro_batch_size=4",
        SPIKE.replace("ACTION", action),
        steps=20,
    )
    poison_batches(trainer, Injection(trainer.engine, 0, 1, "loss", factor=6.0), {17})
    if action == "stop":
        with pytest.raises(
            GuardError,
            match=r"step 18: its loss .* robust deviations, and guards.spike.action is stop",
        ):
            trainer.fit()
    else:
        assert trainer.fit() and same(weights(tmp_path / "run"), weights(tmp_path / "plain"))
    (entry,) = incidents(tmp_path / "run")
    assert (entry["guard"], entry["action"], entry["step"]) == ("spike", action, 18)
    first, second = entry["micro_batches"]
    assert (first["rank"], first["micro_batch"], second["micro_batch"]) == (0, 1, 0) and first[
        "loss"
    ] > 4 * second["loss"]
    assert (
        f"warning: step 18: {entry['reason']}; rank 0, micro batch 1, loss {first['loss']:.4f}: "
        in capsys.readouterr().err
    )
    assert trainer.progress.skipped_steps == (action != "warn")


PEER = "model.moe={kind: peer, product_key_sizes: [6, 6], query_dim: 16, num_heads: 1, top_k: 2}"
BACK = "guards.rollback={max_times: 2, skip_steps: 2}"
ROLLBACKS = [
    pytest.param(0, "fp32", (), marks=pytest.mark.full),
    (1, "fp32", (PEER,)),
    pytest.param(2, "bf16", (), marks=pytest.mark.full),
    pytest.param(3, "bf16", (), marks=pytest.mark.full),
]


@pytest.mark.parametrize(("zero", "precision", "overrides"), ROLLBACKS)
def test_after_a_rollback_the_run_is_bitwise_one_that_never_saw_the_data(
    zero: int, precision: str, overrides: Sequence[str], tiny: Tiny, tmp_path: Path
) -> None:
    settings = (
        *overrides,
        f"train.precision={precision}",
        "train.micro_batch_size=4",
        "checkpoint.interval_steps=4",
        BACK,
    )
    settings += (
        SPIKE.replace("ACTION", "rollback"),
        "logging.usage_interval_steps=8",
        "logging.interval_steps=3",
        "checkpoint.keep_last=9",
    )
    trainer = started(tiny, tmp_path / "run", *settings, zero=zero, steps=26)
    poison_batches(trainer, Injection(trainer.engine, 0, 1, "loss", factor=6.0), {17, 19})
    assert trainer.fit()
    # Step 18 took batch 17: back to step 16, and on with batch 20, which is two steps' worth
    # behind 17.
    assert [(entry["step"], entry["action"]) for entry in incidents(tmp_path / "run")] == [
        (18, "rollback")
    ]
    assert trainer.progress.rollbacks == 1 and trainer.progress.skipped_steps == 1
    rows = curve(tmp_path / "run")
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == [
        *range(3, 26, 3),
        26,
    ]  # rows of three steps, also that of the step it went back to and the two behind it

    other = tmp_path / "other"
    shutil.copytree(tmp_path / "run", other)
    for checkpoint in complete_checkpoints(other / "checkpoints"):
        if int(checkpoint.name.removeprefix("step_")) > 16:
            shutil.rmtree(checkpoint)
    fresh = started(tiny, other, *settings, zero=zero, steps=26)
    assert fresh.progress.step == 16
    fresh.loader.pass_over(16, fresh.loader.consumed(20))
    assert fresh.fit() and incidents(other) == incidents(tmp_path / "run")
    expected = [row | {"skipped_steps": 0} for row in curve(other)]
    assert [row | {"skipped_steps": 0} for row in rows] == expected
    assert same(weights(tmp_path / "run"), weights(other))

    # Killed before it saved anything behind the rollback, it goes back again, to the same end.
    for checkpoint in complete_checkpoints(other / "checkpoints"):
        if int(checkpoint.name.removeprefix("step_")) > 16:
            shutil.rmtree(checkpoint)
    again = started(tiny, other, *settings, zero=zero, steps=26)
    poison_batches(again, Injection(again.engine, 0, 1, "loss", factor=6.0), {17, 19})
    assert again.fit() and again.progress.rollbacks == 1
    assert curve(other) == rows and same(weights(tmp_path / "run"), weights(other))


def test_going_back_needs_a_checkpoint_and_has_a_limit(tiny: Tiny, tmp_path: Path) -> None:
    settings = (
        "guards.non_finite.action=rollback",
        "guards.rollback={max_times: 1, skip_steps: 0}",
    )
    trainer = started(tiny, tmp_path / "none", *settings)
    poison_batches(trainer, Injection(trainer.engine, 0, 0, "loss"), {1})
    with pytest.raises(
        GuardError, match="step 2: .* and there is no checkpoint before it to go back to"
    ):
        trainer.fit()
    trainer = started(tiny, tmp_path / "twice", *settings, "checkpoint.interval_steps=2", steps=9)
    poison_batches(trainer, Injection(trainer.engine, 0, 0, "loss"), {3, 5})
    with pytest.raises(
        NonFiniteError,
        match="step 4: its loss or gradient is not finite, and the run went back 1 times already",
    ):
        trainer.fit()
    assert [(entry["step"], entry["action"]) for entry in incidents(tmp_path / "twice")] == [
        (4, "rollback"),
        (4, "rollback"),
    ]


def test_going_back_to_one_checkpoint_twice_passes_over_both_pieces_of_data(
    tiny: Tiny, tmp_path: Path
) -> None:
    settings = (
        "guards.non_finite.action=rollback",
        "guards.rollback={max_times: 2, skip_steps: 0}",
        "checkpoint.interval_steps=2",
    )
    trainer = started(tiny, tmp_path / "run", *settings, steps=5)
    poison_batches(trainer, Injection(trainer.engine, 0, 0, "loss"), {3, 5})
    assert trainer.fit() and trainer.progress.rollbacks == 2
    # Twice from step 4 to step 2, and the second time on with batch 6: batches 2 to 5 are passed
    # over.
    assert trainer.loader.position(2) // trainer.engine.recipe.train.global_batch_size == 6


def test_a_branch_without_a_checkpoint_of_its_own_goes_back_to_its_trunk(
    tiny: Tiny, tmp_path: Path
) -> None:
    assert started(tiny, tmp_path / "trunk", steps=2).fit()
    trunk = tmp_path / "trunk" / "checkpoints" / "step_2"
    branch = started(
        tiny,
        tmp_path / "branch",
        "guards.non_finite.action=rollback",
        f"branch_from={trunk}",
        steps=5,
    )
    branch.resume(trunk)
    poison_batches(branch, Injection(branch.engine, 0, 0, "loss"), {3})
    assert branch.fit() and (branch.progress.rollbacks, branch.progress.skipped_steps) == (1, 1)
    assert [row["step"] for row in curve(tmp_path / "branch") if row["kind"] == "train"] == [
        3,
        4,
        5,
    ]
    assert trunk.is_dir() and [
        path.name for path in complete_checkpoints(tmp_path / "branch" / "checkpoints")
    ] == ["step_5"]


def test_early_stopping_ends_like_any_end_and_more_patience_goes_on(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    impatient = [
        "model.num_hidden_layers=1",
        "guards.early_stopping={patience: 2, min_delta: 9.0}",
        "validation.max_windows=4",
    ]
    assert main(tiny.arguments(run, *impatient, steps=12)) == 0
    shown = capsys.readouterr()
    # Validations at 2, 4 and 6: nothing falls by nine nats, so the first stays the best, and two
    # more end the run.
    assert (
        "stopped early: the validation loss has not fallen for 2 validations" in shown.out
        and "finished 6 steps" in shown.out
    )
    rows = [row for row in curve(run) if row["step"] == 6]
    assert [row["kind"] for row in rows] == ["train", "validation", "validation"] and rows[1][
        "targets"
    ] < rows[2]["targets"]
    assert (run / "checkpoints" / "latest").read_text() == "step_6\n"
    shutil.copytree(run / "checkpoints" / "step_6", tmp_path / "trunk")
    summary = json.loads((run / "summary.json").read_text())
    assert (
        summary["stopped_early"]
        and summary["steps"] == 6
        and summary["validation_loss_in_training"] == rows[2]["validation_loss"]
    )

    assert main(tiny.arguments(run, *impatient, steps=12)) == 0
    assert (
        "done already" in (said := capsys.readouterr().out)
        and "raise guards.early_stopping.patience" in said
    )
    patient = [
        "model.num_hidden_layers=1",
        "guards.early_stopping={patience: 9, min_delta: 9.0}",
        "validation.max_windows=4",
    ]
    assert main(tiny.arguments(run, *patient, steps=8)) == 0
    assert (
        run / "checkpoints" / "latest"
    ).read_text() == "step_8\n" and "stopped early" not in capsys.readouterr().out
    assert not json.loads((run / "summary.json").read_text())["stopped_early"]

    # A branch has patience of its own.
    branch = [*impatient, f"branch_from={tmp_path / 'trunk'}"]
    assert main(tiny.arguments(tmp_path / "branch", *branch, steps=8)) == 0
    assert (
        tmp_path / "branch" / "checkpoints" / "latest"
    ).read_text() == "step_8\n" and "done already" not in capsys.readouterr().out


def test_a_falling_validation_loss_does_not_end_a_run(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert (
        main(
            tiny.arguments(
                run,
                "model.num_hidden_layers=1",
                "guards.early_stopping={patience: 1}",
                "guards.validation_gap={nats: 0.001}",
            )
        )
        == 0
    )
    assert (run / "checkpoints" / "latest").read_text() == "step_5\n"
    assert "stopped early" not in capsys.readouterr().out
