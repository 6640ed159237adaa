"""What a resume check compares with, and what it takes for a difference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pretrain.config.load import load_recipe
from pretrain.engine.ds_config import reopen_ds_config, resolve_ds_config
from pretrain.verification.job import Layout, Observed
from pretrain.verification.resume_check import (
    Proof,
    Step,
    Tolerance,
    distance,
    reference_layout,
    tolerance_of,
)

ONE, TWO, FOUR = Layout(1, 1, 1), Layout(2, 2, 1), Layout(4, 2, 2)
SEEN = Observed([], {}, [5.0], [1.0], "the run's own data", 1.0)
SAME = Proof(
    checkpoint="step_3",
    reference=ONE,
    why="",
    asked=FOUR,
    device="CPU",
    tensors=9,
    observed=(SEEN, SEEN),
    steps=[Step(4, (5.0, 5.0), (1.0, 1.0 + 1e-8))],
    tolerance=Tolerance(1e-6, ""),
)
RECIPE = load_recipe("debug", ["train.precision=fp32"])


def test_equal_sides_have_no_faults() -> None:
    assert SAME.faults == [] and SAME.to_dict()["resumes"]


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"differing": ["a/exp_avg", "b"]}, "2 of 9 tensors .* the first is 'a/exp_avg'"),
        ({"requantized": {"a/state1": 0.5}}, "1 of 9 tensors .* 'a/state1'"),
        ({"requantized": {"a/state1": math.nan}}, "'a/state1'"),
        ({"data": "random tokens"}, "on random tokens at 4 ranks"),
    ],
)
def test_another_state_is_a_fault(other: dict, sentence: str) -> None:
    proof = replace(SAME, observed=(SEEN, replace(SEEN, **other)))
    with pytest.raises(AssertionError, match=sentence):
        assert not proof.faults, proof.faults[0]


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (Step(4, (5.0, 5.0001), (1.0, 1.0)), "the loss of step 4 is 5 at 1 rank"),
        (Step(4, (5.0, 5.0), (1.0, 1.1)), "the gradient norm of step 4"),
        (Step(4, (math.nan, math.nan), (1.0, 1.0)), "the loss of step 4 is nan"),
    ],
)
def test_another_step_is_a_fault(step: Step, sentence: str) -> None:
    (fault,) = replace(SAME, steps=[step]).faults
    assert sentence in fault


def test_small_requantization_is_none() -> None:
    seen = replace(SEEN, requantized={"a/state1": 0.004})
    assert replace(SAME, observed=(SEEN, seen)).faults == []


def test_distances_are_relative_and_never_of_infinities() -> None:
    assert distance(2.0, 1.0) == 0.5 and distance(0.0, 0.0) == 0.0
    assert math.isnan(distance(math.inf, math.inf))


def test_the_reference_is_the_checkpoints_own_topology_or_one_rank() -> None:
    assert reference_layout(TWO, ONE, RECIPE, 2)[0] == TWO
    assert reference_layout(TWO, FOUR, RECIPE, 1)[0] == TWO
    # The same topology twice would prove little.
    assert reference_layout(TWO, TWO, RECIPE, 2) == (
        ONE,
        "one rank, because the checkpoint was saved at the topology asked for",
    )
    found, why = reference_layout(Layout(64, 8, 1), TWO, RECIPE, 2)
    assert found == ONE and "64 ranks do not fit the 2 devices" in why


def test_tolerances_follow_precision_and_optimizer() -> None:
    def of(*overrides: str) -> float:
        return tolerance_of(load_recipe("debug", ["train.precision=fp32", *overrides])).value

    assert of("optimizer={kind: sgd, learning_rate: 0.1}") == 1e-6
    assert of("optimizer={kind: adamw, learning_rate: 0.1}") == 1e-5
    assert of("train.precision=bf16") > 1e-3
    assert of("model.moe.router={kind: noisy_topk}") > 1e-2


def test_what_depends_on_a_ranks_tokens_is_another_one_at_another_sp_size() -> None:
    for overrides in (
        ["model.moe.router.jitter=0.1"],
        ["model.moe.kind=deepspeed", "model.moe.gate=router"],
    ):
        recipe = load_recipe("debug", ["train.precision=fp32", *overrides])
        assert tolerance_of(recipe).value == 1e-5
        assert "sp_size" in tolerance_of(recipe, other_parts=True).reason
    assert tolerance_of(RECIPE, other_parts=True) == tolerance_of(RECIPE)


def test_a_resolved_ds_config_opens_for_another_number_of_ranks() -> None:
    policy = {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
        "fp16": {"hysteresis": 3},
    }
    resolved = resolve_ds_config(policy, "x", RECIPE, "fp32", 1, 4)
    opened = reopen_ds_config(resolved, RECIPE, 2)
    assert opened["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    again = resolve_ds_config(opened, "x", RECIPE, "bf16", 4, 1)
    assert again["gradient_accumulation_steps"] == 4 and again["bf16"]["enabled"]
    assert again["fp16"] == {"hysteresis": 3, "enabled": False}
    assert resolved["zero_optimization"]["stage"] == 1
