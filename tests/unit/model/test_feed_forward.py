"""Kinds of feed-forward: each against its formula, and as an expert against itself as a dense
layer.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import linear

from pretrain.core.registry import kinds_of
from pretrain.model.config import FeedForwardConfig
from pretrain.model.feed_forward import FeedForward
from pretrain.model.moe.dropless import DroplessMoE
from tests.support.tiny_model import random_tensor, tiny_config

D, F = 32, 24
Formula = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def clamped(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate = gate.clamp(max=7)
    return gate / (1 + torch.exp(-1.702 * gate)) * (up.clamp(-7, 7) + 1)


def gelu(_: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return up * (1 + torch.erf(up / 2**0.5)) / 2


# Kind -> what gate(x) and up(x) become; a kind without a gate has no use for the first.
FORMULAS: dict[str, Formula] = {
    "swiglu": lambda gate, up: gate / (1 + torch.exp(-gate)) * up,
    "gelu": gelu,
    "silu": lambda _, up: up / (1 + torch.exp(-up)),
    "clamped_swiglu": clamped,
    "product_swiglu": lambda gate, up: clamped((gate * up)[..., 0::2], (gate * up)[..., 1::2]),
}


def dense_layer(kind: str, bias: bool) -> FeedForward:
    config = tiny_config(
        f"model.feed_forward={{kind: {kind}, bias: {str(bias).lower()}}}"
    ).feed_forward
    layer: FeedForward = config.implementing_class()(config, D, F)
    for index, parameter in enumerate(layer.parameters()):
        parameter.data = 0.7 * random_tensor(*parameter.shape, seed=index).detach()
    return layer


def test_every_kind_has_its_formula() -> None:
    assert set(FORMULAS) == {
        str(kind.model_fields["kind"].annotation.__args__[0])
        for kind in kinds_of(FeedForwardConfig)
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", FORMULAS)
def test_a_kind_computes_its_formula(kind: str, bias: bool) -> None:
    layer, x = dense_layer(kind, bias), random_tensor(5, D, seed=9)
    up = linear(x, layer.up_proj.weight, layer.up_proj.bias)
    gate = (
        up if layer.gate_proj is None else linear(x, layer.gate_proj.weight, layer.gate_proj.bias)
    )

    def answer(name: str) -> torch.Tensor:
        return linear(FORMULAS[name](gate, up), layer.down_proj.weight, layer.down_proj.bias)

    torch.testing.assert_close(layer(x), answer(kind), rtol=1e-5, atol=1e-4)
    for other in FORMULAS.keys() - {kind, "product_swiglu"} if layer.config.expansion == 1 else ():
        assert not torch.allclose(layer(x), answer(other), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", FORMULAS)
def test_an_expert_of_a_kind_is_that_kind(kind: str, bias: bool) -> None:
    dense = dense_layer(kind, bias)
    moe = f"model.moe={{kind: dropless, num_experts: 1, top_k: 1, moe_intermediate_size: {F}}}"
    layer = DroplessMoE(
        tiny_config(f"model.feed_forward={{kind: {kind}, bias: {str(bias).lower()}}}", moe)
    )
    experts = layer.experts
    halves = (
        dense.up_proj.weight.chunk(2)
        if dense.gate_proj is None
        else (dense.gate_proj.weight, dense.up_proj.weight)
    )
    experts.w1.data[0], experts.w3.data[0], experts.w2.data[0] = (
        halves[0].data,
        halves[1].data,
        dense.down_proj.weight.data,
    )
    if bias:
        biases = (
            dense.up_proj.bias.chunk(2)
            if dense.gate_proj is None
            else (dense.gate_proj.bias, dense.up_proj.bias)
        )
        layer.b1.data[0], layer.b3.data[0], layer.b2.data[0] = (
            biases[0].data,
            biases[1].data,
            dense.down_proj.bias.data,
        )
    x_BSD = random_tensor(2, 3, D, seed=9)
    torch.testing.assert_close(layer(x_BSD)[0], dense(x_BSD), rtol=1e-5, atol=1e-4)
    experts.w3.data[0, 0] += 1.0
    assert not torch.allclose(layer(x_BSD)[0], dense(x_BSD), rtol=1e-3, atol=1e-3)
