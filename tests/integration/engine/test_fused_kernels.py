"""The engine chooses the kernels that the recipe names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pretrain.config.load import load_recipe
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.engine.engine import Engine
from pretrain.engine.topology import Topology
from pretrain.model.kernels.selection import set_fused_kernels, use_fused


class OnCuda:
    """What the choice reads of a tensor on CUDA."""

    dtype, is_cuda = torch.bfloat16, True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    set_fused_kernels("auto")


def test_an_engine_applies_the_recipe(topology: Topology) -> None:
    x: Any = OnCuda()
    for mode, fused in (("none", False), ("auto", True)):
        recipe = load_recipe("debug", ["model.vocab_size=100", f"train.fused_kernels={mode}"])
        accumulation = recipe.train.global_batch_size // recipe.train.micro_batch_size
        config = resolve_ds_config({}, "test", recipe, "fp32", accumulation, 1)
        Engine(recipe, config, "fp32", topology)
        assert use_fused(x) is fused
