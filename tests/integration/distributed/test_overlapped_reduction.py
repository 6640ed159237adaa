"""Gradients that are summed over ranks during the backward pass, as the shipped ds_configs ask."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.core.errors import ConfigError
from pretrain.engine.build import check_buckets
from pretrain.engine.ds_config import read_ds_config
from tests.support.ranks import run_cases
from tests.support.training_cases import ADAMW, MUON, case

# Buckets that a few gradients fill, dense ones and those of experts.
SMALL = {"reduce_bucket_size": 20_000}


def test_overlapped_sums_have_the_bits_of_those_after_the_backward_pass(tmp_path: Path) -> None:
    cases = []
    for stage in (1, 2, 3):
        shipped = read_ds_config(f"zero{stage}")["zero_optimization"]
        assert shipped["stage"] == stage and shipped["overlap_comm"] is True
        for optimizer in (ADAMW, MUON):
            for zero in ({"overlap_comm": False}, shipped, shipped | SMALL):
                one = case("dropless", stage, 2, optimizer)
                name = f"{one['name']}/{len(cases)}"
                cases.append(one | {"name": name, "steps": 3, "zero_optimization": zero})
    results = list(run_cases("training_steps", cases, 2, tmp_path).values())
    assert len(results) == 18
    for first in range(0, len(results), 3):
        after, *overlapped = (
            {key: value for key, value in result.items() if key != "name"}
            for result in results[first : first + 3]
        )
        assert overlapped == [after, after], results[first]["name"]


def test_a_gradient_that_would_be_freed_too_early_is_refused() -> None:
    model = nn.ModuleDict({"small": nn.Linear(4, 4), "stack": nn.Linear(100, 100)})
    gpu, zero = torch.device("cuda"), {"stage": 2, "overlap_comm": True}
    with pytest.raises(ConfigError, match=r"\(9999\) is smaller than the parameter stack.weight"):
        check_buckets(model, zero | {"reduce_bucket_size": 9999}, gpu)
    for fits in (
        zero | {"reduce_bucket_size": 10_000},
        zero,
        zero | {"reduce_bucket_size": "auto"},
        {"stage": 2, "reduce_bucket_size": 9999},
        {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 9999},
        zero | {"reduce_bucket_size": 9999, "offload_optimizer": {"device": "cpu"}},
    ):
        check_buckets(model, fits, gpu)
    check_buckets(model, zero | {"reduce_bucket_size": 9999}, torch.device("cpu"))
