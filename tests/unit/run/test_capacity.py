"""What no machine can hold is refused before a tensor exists; what may be tight is a warning."""

from __future__ import annotations

import argparse
import time
from typing import Any

import pytest

from pretrain.config.load import load_recipe
from pretrain.core.errors import ConfigError
from pretrain.run.capacity import (
    Demand,
    Machine,
    check_any_machine,
    check_machine,
    check_world_size,
    demand_of,
    this_machine,
)
from pretrain.run.dry_run import plan_run
from pretrain.run.resolve import ResolvedConfig, resolve_config

GB = 10**9


def resolved(*overrides: str, stage: int = 1, world_size: int = 1, **zero: Any) -> ResolvedConfig:
    settings = ["model.vocab_size=512", f"train.global_batch_size={2 * world_size}", *overrides]
    return resolve_config(
        load_recipe("debug", settings),
        {"zero_optimization": {"stage": stage, **zero}},
        origin="my.json",
        zero_stage=stage,
        world_size=world_size,
        choose_precision=lambda wanted: "bf16" if wanted == "auto" else wanted,
        datasets=None,
    )


def test_this_machine_holds_the_debug_recipe() -> None:
    machine = this_machine()
    assert machine.host_bytes > GB
    assert check_machine(demand_of(resolved(), False), machine, 1) is None


@pytest.mark.parametrize("world_size", [0, -3, 2**20 + 1, 10**30])
def test_a_number_of_ranks_that_no_cluster_has_is_refused(world_size: int) -> None:
    with pytest.raises(ConfigError, match=f"--world-size {world_size} is no number of ranks"):
        check_world_size(world_size)
    options = argparse.Namespace(world_size=world_size)
    with pytest.raises(ConfigError, match="is no number of ranks"):
        plan_run(options, load_recipe("debug"), {})


def test_a_rank_that_no_machine_holds_is_refused_within_seconds() -> None:
    start = time.monotonic()
    config = resolved("model.hidden_size=1048576", "model.moe.moe_intermediate_size=1048576")
    with pytest.raises(ConfigError, match="one of 1 ranks would hold .* GB of weights"):
        check_any_machine(demand_of(config, False), 1)
    assert time.monotonic() - start < 30


def test_sharding_makes_it_possible_again() -> None:
    """The same model over more ranks with ZeRO 3 takes less of each."""
    alone = demand_of(resolved("model.hidden_size=4096", stage=3), False)
    shared = demand_of(resolved("model.hidden_size=4096", stage=3, world_size=8), False)
    assert shared.host * 7 < alone.host
    assert shared.built < alone.built


def test_offload_moves_the_optimizer_to_the_host() -> None:
    on_gpu = demand_of(resolved(), True)
    offloaded = demand_of(resolved(offload_optimizer={"device": "cpu"}), True)
    assert on_gpu.host == 0 and on_gpu.gpu > 0
    assert offloaded.host > 0 and offloaded.gpu + offloaded.host == on_gpu.gpu
    # On a CPU all of it is on the host anyway.
    assert demand_of(resolved(), False).host == on_gpu.gpu


@pytest.mark.parametrize(
    "demand,machine,part",
    [
        (
            Demand(9 * GB, 0, 0, 0),
            Machine(8 * GB, None, 1),
            "weights and two tensors when it is built",
        ),
        (Demand(0, 5 * GB, 0, 0), Machine(8 * GB, None, 2), "of 2 ranks here take 10.0 GB"),
        (Demand(0, 9 * GB, 0, 0), Machine(8 * GB, None, 1), "of the one rank here take 9.0 GB"),
        (Demand(0, 0, 90 * GB, 0), Machine(800 * GB, 80 * GB, 1), "its GPU has 80.0 GB"),
    ],
)
def test_what_this_machine_cannot_hold_is_refused(
    demand: Demand, machine: Machine, part: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_machine(demand, machine, 2)
    assert part in str(caught.value) and "lower the sizes in 'model'" in str(caught.value)


def test_what_may_be_tight_is_a_warning() -> None:
    demand = Demand(GB, 2 * GB, 0, 5 * GB)
    warning = check_machine(demand, Machine(8 * GB, None, 2), 2)
    assert warning is not None and "about 5.0 GB" in warning and "4.0 GB for it" in warning
    assert check_machine(demand, Machine(16 * GB, None, 2), 2) is None
