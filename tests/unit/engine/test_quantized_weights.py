"""Weights that DeepSpeed cannot quantize are refused before it asserts so in the first step."""

from __future__ import annotations

import pytest
from torch import nn

from pretrain.core.errors import ConfigError
from pretrain.engine.build import check_quantized_weights

ZERO = {"stage": 3, "zero_quantized_weights": True}


def test_a_part_that_is_no_multiple_of_8_is_refused_with_its_name() -> None:
    model = nn.ModuleDict({"matrix": nn.Linear(64, 64, bias=False), "norm": nn.RMSNorm(128)})
    check_quantized_weights(model, ZERO, 16)
    check_quantized_weights(model, {"stage": 3}, 64)
    with pytest.raises(
        ConfigError, match=r"norm.weight \(128 elements\) has 2 on each of 64 ranks"
    ):
        check_quantized_weights(model, ZERO, 64)


def test_an_expert_is_cut_by_the_ranks_that_share_it() -> None:
    model = nn.Linear(16, 8, bias=False)
    with pytest.raises(ConfigError, match="has 4 on each of 32 ranks"):
        check_quantized_weights(model, ZERO, 32)
    model.weight.group_name = "ep_size_4"
    check_quantized_weights(model, ZERO, 32)
