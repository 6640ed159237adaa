"""Lion and 8-bit AdamW against other implementations, what their state weighs, and what the plan
says of it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from pretrain.config.load import load_recipe
from pretrain.config.rules.sections import check_topology
from pretrain.core.errors import ConfigError
from pretrain.engine.precision import hardware_warnings
from pretrain.model.decoder import DecoderLM
from pretrain.model.sizes import model_size
from pretrain.optim.config import AdamW8bitConfig, AdamWConfig, LionConfig, MuonConfig, Optimizer
from pretrain.optim.param_groups import build_optimizer, is_hidden_matrix
from pretrain.run.memory import state_bytes_per_rank

RATE = 1e-3
CONFIGS: dict[str, Optimizer] = {
    "adamw": AdamWConfig(learning_rate=RATE),
    "adamw_8bit": AdamW8bitConfig(kind="adamw_8bit", learning_rate=RATE),
    "lion": LionConfig(kind="lion", learning_rate=RATE),
}


def trained(optimizer_of: Any, size: int, steps: int) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A parameter after some steps of random gradients, and its optimizer."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, size))
    optimizer = optimizer_of(parameter)
    for step in range(steps):
        parameter.grad = torch.randn(size, generator=torch.Generator().manual_seed(step)) + 0.5
        optimizer.step()
    return parameter.detach(), optimizer


def build(config: Optimizer) -> Any:
    return lambda parameter: build_optimizer(
        [{"params": [parameter], "lr": RATE, "weight_decay": config.weight_decay}], config
    )


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of live tensors; the 256 levels that all 8-bit states share do not count."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if torch.is_tensor(value) and "qmap" not in name
    )


@pytest.mark.parametrize(
    "kind,expected", [("adamw", 8.0), ("adamw_8bit", 2.0 + 8 / 256), ("lion", 4.0)]
)
def test_the_state_weighs_what_the_kind_says(kind: str, expected: float) -> None:
    size = 1 << 16
    _, optimizer = trained(build(CONFIGS[kind]), size, 1)
    assert CONFIGS[kind].matrix_state_bytes == expected
    assert held_bytes(optimizer) / size == pytest.approx(expected, abs=1e-3)


def test_eight_bits_follow_adamw_closely_and_not_exactly() -> None:
    size, steps = 1 << 14, 30
    start = torch.linspace(-1, 1, size)
    full, small = (
        (trained(build(CONFIGS[kind]), size, steps)[0] - start) for kind in ("adamw", "adamw_8bit")
    )
    error = (small - full).norm() / full.norm()
    assert 1e-5 < error < 0.05


def test_a_saved_8_bit_state_goes_on_bit_for_bit() -> None:
    """torch's own load_state_dict would make floats of the codes."""
    size, config = 1 << 13, CONFIGS["adamw_8bit"]
    straight, _ = trained(build(config), size, 6)
    parameter, optimizer = trained(build(config), size, 3)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = torch.nn.Parameter(parameter.clone())
    again = build(config)(resumed)
    again.load_state_dict(state)
    forgetful = torch.nn.Parameter(parameter.clone())
    fresh = build(config)(forgetful)
    for step in range(3, 6):
        for one, its in ((resumed, again), (forgetful, fresh)):
            one.grad = torch.randn(size, generator=torch.Generator().manual_seed(step)) + 0.5
            its.step()
    assert again.state[resumed]["state1"].dtype == torch.uint8
    assert torch.equal(resumed, straight) and not torch.equal(forgetful, straight)


def test_lion_is_bitsandbytes_lion() -> None:
    import bitsandbytes

    size = 1000
    ours, _ = trained(build(CONFIGS["lion"]), size, 8)
    theirs, _ = trained(
        lambda parameter: bitsandbytes.optim.Lion32bit(
            [parameter], lr=RATE, betas=(0.9, 0.99), weight_decay=0.1
        ),
        size,
        8,
    )
    swapped, _ = trained(
        lambda parameter: bitsandbytes.optim.Lion32bit(
            [parameter], lr=RATE, betas=(0.99, 0.9), weight_decay=0.1
        ),
        size,
        8,
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (ours - swapped).abs().max() > RATE


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "model.moe.num_shared_experts=1",
            "model.moe.shared_expert_gate=true",
            "model.multi_token_prediction={}",
        ],
        [
            "model.moe.kind=deepspeed",
            "model.moe.drop_tokens=false",
            "model.moe.use_residual=true",
            "model.attention.bias=all",
        ],
        [
            "model.layer_pattern={kind: every_nth, n: 2}",
            "model.intermediate_size=24",
            "model.embedding_size=16",
        ],
        [
            "model.moe={kind: peer, product_key_sizes: [4, 4], query_dim: 12, num_heads: 2, top_k:"
            " 3, moe_intermediate_size: 2}"
        ],
    ],
)
def test_the_plan_counts_the_matrices_that_muon_trains(overrides: list[str]) -> None:
    config = load_recipe("debug", ["model.vocab_size=128", *overrides]).model
    with torch.device("meta"):
        model = DecoderLM(config)
    dense = {
        name: parameter
        for name, parameter in model.named_parameters()
        if getattr(parameter, "allreduce", True)
    }
    expected = sum(
        parameter.numel()
        for name, parameter in dense.items()
        if is_hidden_matrix(name, parameter, model.config) and ".experts." not in name
    )
    assert model_size(config, 16).parameters_matrices == expected > 0


def test_the_plans_memory_follows_the_optimizer() -> None:
    size = model_size(load_recipe("debug", ["model.vocab_size=128"]).model, 16)
    muon = MuonConfig(kind="muon", learning_rate=RATE)
    held = {
        config.kind: (
            state_bytes_per_rank(size, "fp32", 0, 1, 1, config)["optimizer"]
            / size.parameters_stored
        )
        for config in (*CONFIGS.values(), muon)
    }
    assert (
        held["adamw"] == pytest.approx(8)
        and held["lion"] == pytest.approx(4)
        and held["adamw_8bit"] == pytest.approx(2.03, abs=0.01)
    )
    assert 4 < held["muon"] < 6


@pytest.mark.parametrize("kind", ["lion", "adamw_8bit"])
def test_rows_of_tables_are_refused_by_kinds_that_cannot_train_them(kind: str) -> None:
    peer = (
        "model.moe={kind: peer, product_key_sizes: [4, 4], query_dim: 12, num_heads: 2, top_k: 3,"
        " moe_intermediate_size: 2}"
    )
    with pytest.raises(
        ConfigError, match=f"optimizer.kind={kind} does not go with model.moe.kind=peer"
    ):
        load_recipe("debug", [peer, f"optimizer={{kind: {kind}, learning_rate: 1e-3}}"])
    rows = load_recipe(
        "debug", [peer, "optimizer={kind: muon, learning_rate: 1e-3, beta2: 0.9}"]
    ).optimizer.sparse_optimizer
    assert rows == AdamWConfig(learning_rate=1e-3, beta2=0.9)


def test_compiled_blocks_are_refused_at_stage_3() -> None:
    recipe = load_recipe("debug", ["train.compile=blocks"])
    assert check_topology(recipe, 1, 2)
    with pytest.raises(ConfigError, match="train.compile=blocks cannot run with ZeRO stage 3"):
        check_topology(recipe, 1, 3)


def test_tf32_says_where_it_has_no_effect() -> None:
    warnings = hardware_warnings(load_recipe("debug", ["train.tf32=true"]))
    assert len(warnings) == (
        not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8)
    )
    assert all("train.tf32 has no effect here" in warning for warning in warnings)
    assert hardware_warnings(load_recipe("debug")) == []
