"""A run that is interrupted anywhere ends with the numbers of one that was not, to the last bit."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.loading.shard_loader import ShardLoader
from pretrain.checkpoint import engine_state
from pretrain.checkpoint.layout import read_state, resolve_checkpoint
from pretrain.core.errors import PREEMPTED
from pretrain.model.decoder import DecoderLM
from pretrain.train import main
from tests.support.tiny_run import Tiny, curve, make_trainer

STEPS, ACCUMULATION = 7, 2
CASES = [("fp32", 1), ("bf16", 2)]
Baseline = Callable[[str, int], Path]


def arguments_for(tiny: Tiny, run: Path, precision: str, zero: int) -> list[str]:
    # Rows at 3, 6 and 7, validations at 2, 4, 6 and 7, saves at 4 and 7, and two micro batches a
    # step.
    settings = (
        "train.micro_batch_size=4",
        "logging.interval_steps=3",
        "checkpoint.interval_steps=4",
    )
    return tiny.arguments(run, f"train.precision={precision}", *settings, steps=STEPS, zero=zero)


def end_of(run: Path) -> tuple[list[dict[str, Any]], Any]:
    """All rows, and what the guards remember."""
    return curve(run), read_state(resolve_checkpoint(run / "checkpoints"))["guards"]


@pytest.fixture(scope="module")
def baseline(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    """An uninterrupted run, made once for each case."""
    made: dict[tuple[str, int], Path] = {}

    def get(precision: str, zero: int) -> Path:
        if (precision, zero) not in made:
            run = tmp_path_factory.mktemp("baseline") / "run"
            assert main(arguments_for(tiny, run, precision, zero)) == 0
            made[precision, zero] = run
        return made[precision, zero]

    return get


def stop_in_micro_batch(patch: pytest.MonkeyPatch, number: int) -> None:
    """This process gets SIGTERM while it computes micro batch ``number`` (from 1) of training."""
    forward = DecoderLM.forward
    seen: list[None] = []

    def interrupted(model: DecoderLM, *inputs: Any) -> Any:
        if model.training:
            seen.append(None)
            if len(seen) == number:
                signal.raise_signal(signal.SIGTERM)
        return forward(model, *inputs)

    patch.setattr(DecoderLM, "forward", interrupted)


def train_interrupted(arguments: list[str], micro_batch: int) -> int:
    with pytest.MonkeyPatch.context() as patch:
        stop_in_micro_batch(patch, micro_batch)
        return main(arguments)


@pytest.mark.parametrize(("precision", "zero"), CASES)
def test_interrupted_in_every_step_and_resumed_the_curve_is_bitwise_the_same(
    precision: str, zero: int, tiny: Tiny, baseline: Baseline, tmp_path: Path
) -> None:
    expected = baseline(precision, zero)
    assert [row["steps"] for row in curve(expected) if row["kind"] == "train"] == [3, 3, 1]
    arguments = arguments_for(tiny, tmp_path / "run", precision, zero)
    for step in range(1, STEPS):
        # Alternately in the first micro batch of the step, before anything is accumulated, and in
        # the second.
        assert train_interrupted(arguments, 1 + step % ACCUMULATION) == PREEMPTED
        assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{step}\n"
    assert main(arguments) == 0
    assert end_of(tmp_path / "run") == end_of(expected)


def forget_optimizer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine_state, "load_optimizer", lambda *given: None)


def read_the_next_step(patch: pytest.MonkeyPatch) -> None:
    read = ShardLoader.step_batches
    patch.setattr(ShardLoader, "step_batches", lambda loader, step: read(loader, step + 1))


@pytest.mark.parametrize("break_resume", [forget_optimizer, read_the_next_step])
def test_a_resume_without_optimizer_state_or_at_another_sample_is_noticed(
    break_resume: Callable[[pytest.MonkeyPatch], None],
    tiny: Tiny,
    baseline: Baseline,
    tmp_path: Path,
) -> None:
    arguments = arguments_for(tiny, tmp_path / "run", "fp32", 1)
    assert train_interrupted(arguments, 3 * ACCUMULATION) == PREEMPTED
    with pytest.MonkeyPatch.context() as patch:
        break_resume(patch)
        assert main(arguments) == 0
    rows, expected = curve(tmp_path / "run"), curve(baseline("fp32", 1))
    assert [row for row in rows if row["step"] <= 3] == [
        row for row in expected if row["step"] <= 3
    ]
    assert rows != expected


def test_rows_after_the_checkpoint_are_taken_back_when_a_run_dies_without_saving(
    tiny: Tiny, baseline: Baseline, tmp_path: Path
) -> None:
    arguments = arguments_for(tiny, tmp_path / "run", "fp32", 1)
    forward, seen = DecoderLM.forward, []

    def dying(model: DecoderLM, *inputs: Any) -> Any:
        seen.append(model.training)
        if sum(seen) == 5 * ACCUMULATION:
            raise KeyboardInterrupt
        return forward(model, *inputs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DecoderLM, "forward", dying)
        main(arguments)
    assert curve(tmp_path / "run")[-1]["step"] == 4
    assert main(arguments) == 0
    assert end_of(tmp_path / "run") == end_of(baseline("fp32", 1))


PEER = "model.moe={kind: peer, product_key_sizes: [6, 6], query_dim: 16, num_heads: 1, top_k: 2}"
ADAMW = (
    "optimizer.weight_decay=0.25",
    "optimizer.beta2=0.5",
    "optimizer.eps=1e-4",
    "train.grad_clip=0.25",
)
MOMENTUM = ("optimizer={kind: sgd, learning_rate: 0.01, momentum: 0.9}", "train.grad_clip=0.25")


@pytest.mark.parametrize(
    ("zero", "before", "now"),
    [
        (0, (), ADAMW),
        (1, (), ADAMW),
        (3, (), ADAMW),
        (1, (PEER, "optimizer={kind: sgd, learning_rate: 0.01}"), (PEER, *MOMENTUM)),
    ],
)
def test_what_the_recipe_says_of_the_optimizer_now_holds_after_a_resume(
    zero: int, before: tuple[str, ...], now: tuple[str, ...], tiny: Tiny, tmp_path: Path
) -> None:
    small = ("model.num_hidden_layers=1", "validation.interval_steps=9")
    assert make_trainer(tiny, tmp_path, *small, *before, zero=zero, steps=2).fit()
    resumed = make_trainer(tiny, tmp_path, *small, *now, zero=zero, steps=3)
    optimizer = resumed.engine.optimizer
    asked = [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    resumed.resume(tmp_path / "checkpoints" / "step_2")
    assert [
        {name: group[name] for name in options}
        for group, options in zip(optimizer.param_groups, asked, strict=True)
    ] == asked
    assert any(
        group["weight_decay"] == 0.25 or group.get("momentum") == 0.9
        for group in optimizer.param_groups
    )
    assert getattr(optimizer, "clip_grad", 0.25) == 0.25
    assert resumed.fit()
