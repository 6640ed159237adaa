"""When a run is tested at its start, and what counts as another gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pretrain.config.load import load_recipe
from pretrain.verification.self_test import (
    LONG_RUN_SECONDS,
    Observation,
    differences,
    expected_seconds,
    is_due,
)

RIGHT = Observation({"loss": 5.0, "router loss 0": 1.0}, 2.0, {"a[0]": 0.5, "a[1]": 0.4})
SIZES = ["model.vocab_size=128", "train.precision=fp32", "run_path=/nowhere"]


def test_equal_observations_pass() -> None:
    assert differences(replace(RIGHT, norm=2.00001), RIGHT, "fp32") == []


@pytest.mark.parametrize(
    ("wrong", "clause"),
    [
        ({"losses": {"loss": 5.1, "router loss 0": 1.0}}, "loss is 5.1 instead of 5"),
        ({"losses": {"loss": 5.0}}, "router loss 0 is nan"),
        ({"norm": 2.01}, "gradient norm is 2.01 instead of 2"),
        ({"norm": math.nan}, "gradient norm is nan"),
        ({"experts": {"a[0]": 0.5, "a[1]": 0.404}}, "gradient norm of a[1] is 0.404"),
        ({"experts": {"a[0]": 0.5}}, "1 gradients of experts have no counterpart, as a[1]"),
    ],
)
def test_a_difference_is_named(wrong: dict, clause: str) -> None:
    assert clause in "; ".join(differences(replace(RIGHT, **wrong), RIGHT, "fp32"))


def test_low_precision_still_finds_a_wrong_scale() -> None:
    doubled = replace(RIGHT, experts={name: 2 * norm for name, norm in RIGHT.experts.items()})
    assert differences(replace(RIGHT, norm=2.02), RIGHT, "bf16") == []
    assert len(differences(doubled, RIGHT, "bf16")) == 2


def test_auto_tests_long_runs_on_several_ranks() -> None:
    short = load_recipe("debug", SIZES)
    long = load_recipe("debug", [*SIZES, "train.train_tokens=1000000000000000"])
    assert expected_seconds(short, 2) < LONG_RUN_SECONDS < expected_seconds(long, 2)
    assert [is_due(short, 2), is_due(long, 2), is_due(long, 1)] == [False, True, False]


def test_the_recipe_decides() -> None:
    assert is_due(load_recipe("debug", [*SIZES, "train.self_test=on"]), 1)
    long = [*SIZES, "train.train_tokens=1000000000000000", "train.self_test=off"]
    assert not is_due(load_recipe("debug", long), 2)
