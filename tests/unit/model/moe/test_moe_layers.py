"""Both kinds of MoE layer against a loop over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pretrain.core.errors import ConfigError
from pretrain.model.moe.deepspeed_native import DeepSpeedMoE
from pretrain.model.moe.dropless import DroplessMoE
from tests.support.tiny_model import random_tensor, tiny_model

E, WIDTH = 4, 24
Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# Kind, top_k, whether the weights are renormalised; DeepSpeed's layer always does so for more than
# one choice, and never for one.
LAYERS = [
    ("dropless", 1, False),
    ("dropless", 1, True),
    ("dropless", 2, True),
    ("dropless", 3, False),
    ("dropless", 4, True),
]
LAYERS += [("deepspeed", 1, False), ("deepspeed", 2, True), ("deepspeed", 3, True)]


def moe_layer(
    kind: str, top_k: int, norm_topk_prob: bool, **fields: Any
) -> DroplessMoE | DeepSpeedMoE:
    router = f"{{norm_topk_prob: {norm_topk_prob}}}"
    given = {
        "num_experts": E,
        "top_k": top_k,
        "moe_intermediate_size": WIDTH,
        "router": router,
        **fields,
    }
    if kind == "deepspeed":
        given = {"drop_tokens": False} | given
    inside = ", ".join(f"{name}: {str(value).lower()}" for name, value in given.items())
    layer = tiny_model(f"model.moe={{kind: {kind}, {inside}}}").layers[0].feed_forward
    assert isinstance(layer, DroplessMoE | DeepSpeedMoE)
    return layer


def parts_of(layer: DroplessMoE | DeepSpeedMoE) -> tuple[torch.Tensor, list[Expert]]:
    """The router's matrix [E, D] and each expert's (gate, down, up)."""
    if isinstance(layer, DroplessMoE):
        return layer.router.gate.weight, list(
            zip(layer.experts.w1, layer.experts.w2, layer.experts.w3)
        )
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    return layer.deepspeed_moe.gate.wg.weight, [
        (one.gate_proj.weight, one.down_proj.weight, one.up_proj.weight) for one in experts
    ]


def token_by_token(
    layer: DroplessMoE | DeepSpeedMoE, x_BSD: torch.Tensor, top_k: int, norm_topk_prob: bool
) -> tuple[torch.Tensor, list[int]]:
    """The layer's output and how many tokens chose each expert."""
    router_ED, experts = parts_of(layer)
    outputs, counts = [], [0] * E
    for x_D in x_BSD.flatten(0, 1):
        probs = (router_ED @ x_D).softmax(0)
        best = sorted(range(E), key=lambda expert: -probs[expert].item())[:top_k]
        scale = probs[best].sum() if norm_topk_prob else 1.0
        y_D = torch.zeros_like(x_D)
        for expert in best:
            gate, down, up = experts[expert]
            y_D = y_D + probs[expert] / scale * (down @ (functional.silu(gate @ x_D) * (up @ x_D)))
            counts[expert] += 1
        outputs.append(y_D)
    return torch.stack(outputs).view_as(x_BSD), counts


def gradients_of(output: torch.Tensor, x_BSD: torch.Tensor, layer: nn.Module) -> list[torch.Tensor]:
    return list(
        torch.autograd.grad(
            (output * random_tensor(*output.shape, seed=7)).sum(),
            [x_BSD, *layer.parameters()],
            materialize_grads=True,
        )
    )


@pytest.mark.parametrize("kind,top_k,norm_topk_prob", LAYERS)
def test_layer_equals_a_loop_over_tokens_with_gradients(
    kind: str, top_k: int, norm_topk_prob: bool
) -> None:
    layer, x_BSD = moe_layer(kind, top_k, norm_topk_prob), random_tensor(2, 9, 32)
    output, statistics = layer(x_BSD)
    expected, counts = token_by_token(layer, x_BSD, top_k, norm_topk_prob)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert statistics.counts_E.tolist() == counts
    assert statistics.dropped.item() == 0.0
    for ours, other in zip(
        gradients_of(output, x_BSD, layer), gradients_of(expected, x_BSD, layer), strict=True
    ):
        torch.testing.assert_close(ours, other, atol=2e-5, rtol=1e-4)


def test_one_choice_too_few_is_told_apart() -> None:
    layer, x_BSD = moe_layer("dropless", 3, True), random_tensor(2, 9, 32)
    expected, _ = token_by_token(layer, x_BSD, 2, True)
    assert (layer(x_BSD)[0] - expected).abs().max() > 1e-2


def test_both_kinds_have_the_same_router_losses() -> None:
    x_BSD = random_tensor(2, 9, 32)
    _, dropless = moe_layer("dropless", 2, True)(x_BSD)
    _, native = moe_layer("deepspeed", 2, True)(x_BSD)
    for name, one, other in zip(dropless._fields, dropless, native):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("top_k,norm_topk_prob", [(1, False), (2, True), (3, True)])
def test_drops_are_counted_and_the_load_is_that_before_them(
    top_k: int, norm_topk_prob: bool
) -> None:
    room = {"drop_tokens": True, "causal": False, "capacity_factor": 0.5, "min_capacity": 0}
    x_BSD = random_tensor(4, 16, 32)
    _, statistics = moe_layer("deepspeed", top_k, norm_topk_prob, **room)(x_BSD)
    _, undropped = moe_layer("deepspeed", top_k, norm_topk_prob)(x_BSD)
    assert (
        0.5 <= statistics.dropped.item() < 1.0
    )  # half the room cannot hold more than half the choices
    assert torch.equal(statistics.counts_E, undropped.counts_E)
    assert statistics.counts_E.sum().item() == 64 * top_k


def test_shared_experts_see_every_token_and_are_added() -> None:
    layer, x_BSD = moe_layer("dropless", 2, True, num_shared_experts=2), random_tensor(2, 9, 32)
    assert layer.shared is not None and layer.shared.feed_forward.gate_proj.weight.shape == (
        2 * WIDTH,
        32,
    )
    routed, _ = token_by_token(layer, x_BSD, 2, True)
    shared = layer.shared(x_BSD)
    assert shared.abs().max() > 1e-2
    torch.testing.assert_close(layer(x_BSD)[0], routed + shared, atol=1e-5, rtol=1e-5)


def test_a_residual_expert_is_mixed_by_its_coefficient() -> None:
    layer, x_BSD = moe_layer("deepspeed", 2, True, use_residual=True), random_tensor(2, 9, 32)
    routed, _ = token_by_token(layer, x_BSD, 2, True)
    mix = layer.coefficient(x_BSD).softmax(-1)
    torch.testing.assert_close(
        layer(x_BSD)[0],
        routed * mix[..., :1] + layer.mlp(x_BSD) * mix[..., 1:],
        atol=1e-5,
        rtol=1e-5,
    )


def test_expert_kernels_can_be_swapped() -> None:
    x_BSD = random_tensor(2, 9, 32)
    loop, _ = moe_layer("dropless", 2, True, expert_kernel="loop")(x_BSD)
    grouped, _ = moe_layer("dropless", 2, True, expert_kernel="grouped_mm")(x_BSD)
    torch.testing.assert_close(loop, grouped, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dropless", "deepspeed"])
def test_a_bf16_layer_keeps_its_dtype_and_fp32_statistics(kind: str) -> None:
    layer = moe_layer(kind, 2, True)
    expected = layer(random_tensor(2, 9, 32))[0]
    output, statistics = layer.to(torch.bfloat16)(random_tensor(2, 9, 32, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert {value.dtype for value in statistics} == {torch.float32}
    assert (output.float() - expected).norm() / expected.norm() < 0.1


def test_experts_of_odd_width_without_a_gate_are_refused() -> None:
    odd = "model.moe={kind: dropless, num_experts: 4, top_k: 2, moe_intermediate_size: 25}"
    with pytest.raises(ConfigError, match=r"moe_intermediate_size \(25\) must be even"):
        tiny_model(odd, "model.feed_forward.kind=gelu")
    tiny_model(odd)
