"""The fused kernels of MoE layers against the plain code; run by test_fused_moe in a process of its
own, because Triton decides when it is imported whether it interprets.

The interpreter cuts bf16 off where a GPU rounds: bf16 may differ by a unit in the last place. fp16
it rounds to the nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional

from pretrain.model.config import ClampedSwiGLUConfig, SwiGLUConfig
from pretrain.model.feed_forward import ClampedSwiGLU, SwiGLU
from pretrain.model.kernels import gated, rows
from pretrain.model.kernels.selection import Mode, set_fused_kernels
from pretrain.model.moe.dispatch import combine, gather_tokens, group_rows
from pretrain.model.moe.dropless import DroplessMoE
from tests.support.moe_traffic import traffic_of_a_layer
from tests.support.tiny_model import random_tensor, random_tokens, tiny_config, tiny_model

DEVICE: str
FUSED: Mode
DEVICE, FUSED = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", "always")
# Relative: the rounding of fp32 sums in another order, and a unit in the last place.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
# T, K, D, E: several tiles, one choice, no token, rows of one element, more experts than rows.
SHAPES = [(9, 3, 33, 5), (5, 1, 600, 4), (0, 2, 8, 4), (3, 2, 1, 2), (130, 8, 70, 64)]
CONFIGS: dict[str, tuple[Any, Any]] = {
    "swiglu": (SwiGLU, SwiGLUConfig()),
    "clamped": (ClampedSwiGLU, ClampedSwiGLUConfig(kind="clamped_swiglu", limit=0.75)),
}


@pytest.fixture(autouse=True)
def fused() -> Iterator[None]:
    set_fused_kernels(FUSED)
    yield
    set_fused_kernels("auto")


def both(compute: Callable[[], Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients, by the kernels and by the plain code."""
    results = []
    for mode in (FUSED, "none"):
        set_fused_kernels(mode)
        output = compute()
        gradient = random_tensor(*output.shape, seed=99, dtype=output.dtype).detach().to(DEVICE)
        results.append([output.detach(), *torch.autograd.grad(output, inputs, gradient)])
    set_fused_kernels(FUSED)
    return results[0], results[1]


def assert_same(ours: list[Tensor], plain: list[Tensor]) -> None:
    for one, other in zip(ours, plain, strict=True):
        assert one.dtype == other.dtype
        tolerance = TOLERANCES[one.dtype]
        scale = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=tolerance, atol=1e-6 * scale)


def grouped(T: int, K: int, E: int) -> tuple[Tensor, Tensor]:
    """The permutation of random choices; experts may have no rows."""
    generator = torch.Generator().manual_seed(T + K)
    ids_R = torch.rand(T, E, generator=generator).topk(K).indices.flatten()
    return group_rows(ids_R.to(DEVICE), E)[:2]


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_tensor(*shape, seed=seed, dtype=dtype).detach().to(DEVICE).requires_grad_()


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_gathered_tokens_and_their_gradients_equal_the_plain_ones(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    T, K, D, E = shape
    order_R, inverse_R = grouped(T, K, E)
    x_TD = leaf(T, D, dtype=dtype)
    ours, plain = both(lambda: gather_tokens(x_TD, order_R, inverse_R, K), [x_TD])
    assert torch.equal(ours[0], plain[0])
    assert_same(ours, plain)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_combined_rows_and_their_gradients_equal_the_plain_ones(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    T, K, D, E = shape
    order_R, inverse_R = grouped(T, K, E)
    rows_RD, weights_TK = leaf(T * K, D, dtype=dtype), leaf(T, K, seed=1)
    ours, plain = both(
        lambda: combine(rows_RD, order_R=order_R, inverse_R=inverse_R, weights_TK=weights_TK),
        [rows_RD, weights_TK],
    )
    assert_same(ours, plain)


def test_another_permutation_is_noticed() -> None:
    order_R, inverse_R = grouped(9, 3, 5)
    rows_RD, weights_TK = leaf(27, 33), leaf(9, 3, seed=1)
    ours = rows.combine(rows_RD, inverse_R.roll(1), weights_TK)
    set_fused_kernels("none")
    plain = combine(rows_RD, order_R=order_R, inverse_R=inverse_R, weights_TK=weights_TK)
    with pytest.raises(AssertionError):
        assert_same([ours], [plain])


def test_sums_are_rounded_once() -> None:
    """256 + 1 + 1 is 256 if bf16 sums are rounded one by one."""
    identity = torch.arange(3, device=DEVICE)
    rows_RD = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16, device=DEVICE)
    weights_TK = torch.ones(1, 3, device=DEVICE)
    assert rows.combine(rows_RD, identity, weights_TK).item() == 258.0
    assert rows.sum_choices(rows_RD, identity, identity, 3).item() == 258.0


@DTYPES
@pytest.mark.parametrize("shape", [(7, 33), (0, 8), (2, 3, 700)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_activations_and_their_gradients_equal_the_plain_ones_in_fp32(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """In fp32, because the plain code rounds each step to the tensors' dtype."""
    part, config = CONFIGS[kind]
    gate, up = leaf(*shape, dtype=dtype), leaf(*shape, seed=1, dtype=dtype)
    exact = [value.detach().float().requires_grad_() for value in (gate, up)]
    ours, _ = both(lambda: part.activate(config, gate, up), [gate, up])
    gradient = random_tensor(*shape, seed=99, dtype=dtype).detach().to(DEVICE)
    set_fused_kernels("none")
    hidden = part.activate(config, *exact)
    plain = [hidden.detach(), *torch.autograd.grad(hidden, exact, gradient.float())]
    for one, other in zip(ours, plain, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, rtol=2 * TOLERANCES[dtype], atol=1e-6)


def test_activations_keep_nan_and_their_gradients_at_the_limit() -> None:
    """As torch.clamp does: a gradient passes at the limit itself, and none above."""
    gate = torch.tensor([float("nan"), 1.0, 1.5, 0.5], device=DEVICE, requires_grad=True)
    up = torch.tensor([0.5, 1.0, 0.5, float("nan")], device=DEVICE, requires_grad=True)
    hidden = gated.gated(gate, up, 1.5, 1.0)
    hidden.sum().backward()
    assert gate.grad is not None and up.grad is not None
    assert hidden.isnan().tolist() == [True, False, False, True]
    assert (gate.grad[1:3] != 0).tolist() == [True, False]
    assert (up.grad[1:3] != 0).tolist() == [True, True]
    assert gated.gated(gate, up).isnan().tolist() == hidden.isnan().tolist()


def test_second_derivatives_are_right_or_refused() -> None:
    order_R, inverse_R = grouped(4, 2, 3)
    x_TD = leaf(4, 5)
    rows_RD = gather_tokens(x_TD, order_R, inverse_R, 2)
    (first,) = torch.autograd.grad(rows_RD.pow(3).sum(), x_TD, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x_TD)
    # Each element is cubed in two rows: 2 * 3 * 2 * x.
    torch.testing.assert_close(second, 12 * x_TD.detach())
    inputs = [leaf(8, 5), leaf(4, 2, seed=1)]
    gates = [leaf(3, 4), leaf(3, 4, seed=1)]
    for output, leaves in (
        (rows.combine(inputs[0], inverse_R, inputs[1]), inputs),
        (gated.gated(*gates), gates),
    ):
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="no autograd formula|autograd"):
            torch.autograd.grad(first.sum(), leaves)


def test_operators_keep_the_rules_of_torch() -> None:
    """Schemas, shapes without data, gradients and tracing, by torch's own checks."""
    order_R, inverse_R = grouped(4, 2, 3)
    gradient, rows_RD, weights_TK = leaf(4, 5), leaf(8, 5), leaf(4, 2)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (rows.gather_tokens, (gradient, order_R, inverse_R, 2)),
        (rows.sum_choices, (rows_RD, order_R, inverse_R, 2)),
        (rows.combine, (rows_RD, inverse_R, weights_TK)),
        (
            rows.combine_backward,
            (gradient.detach(), rows_RD.detach(), inverse_R, weights_TK.detach()),
        ),
        (gated.gated, (gradient, leaf(4, 5), 1.5, 2.0)),
        (gated.gated_backward, (*(leaf(4, 5).detach() for _ in range(3)), 1.0, None)),
    ]
    for operator, arguments in calls:
        opcheck(operator, arguments)


def test_rows_to_experts_and_back_are_one_compiled_graph() -> None:
    order_R, inverse_R = grouped(6, 2, 3)

    def there_and_back(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        rows_RD = functional.silu(gather_tokens(x_TD, order_R, inverse_R, 2))
        return combine(rows_RD, order_R=order_R, inverse_R=inverse_R, weights_TK=weights_TK)

    leaves = [leaf(6, 8), leaf(6, 2, seed=1)]
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    results = [
        [output.detach(), *torch.autograd.grad(output.sum(), leaves)]
        for output in (compiled(*leaves), there_and_back(*leaves))
    ]
    assert all(map(torch.equal, *results))


def layer_results(moe: str, dtype: torch.dtype, training: bool) -> list[Tensor]:
    """A whole layer's output, losses and all its gradients."""
    layer = DroplessMoE(tiny_config(f"model.moe={moe}"))
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    layer = layer.to(DEVICE, dtype)
    x_BSD = leaf(2, 9, 32, dtype=dtype)
    y_BSD, statistics = layer.train(training)(x_BSD)
    torch.autograd.backward([y_BSD.float().square().sum(), statistics.losses_J.sum()])
    gradients = [parameter.grad for parameter in layer.parameters()]
    assert None not in gradients and x_BSD.grad is not None
    return [y_BSD.detach(), statistics.losses_J.detach(), x_BSD.grad, *gradients]


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("kernel", ["loop", "grouped_mm"])
def test_a_layer_equals_itself_without_the_kernels(kernel: str, top_k: int) -> None:
    moe = (
        f"{{kind: dropless, num_experts: 7, top_k: {top_k}, moe_intermediate_size: 40,"
        f" num_shared_experts: 1, expert_kernel: {kernel}}}"
    )
    ours = layer_results(moe, torch.float32, True)
    set_fused_kernels("none")
    for one, other in zip(ours, layer_results(moe, torch.float32, True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def model_gradients() -> list[Tensor]:
    """The loss of a model that recomputes its activations, and all its gradients."""
    model = tiny_model(activation_checkpointing=True).to(DEVICE).train()
    tokens = random_tokens(2, 9, seed=5).to(DEVICE)
    output = model(tokens[:, :-1], tokens[:, 1:], torch.tensor(16.0, device=DEVICE))
    output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [output.loss.detach(), *(one for one in gradients if one is not None)]


def test_recomputed_activations_equal_the_plain_ones() -> None:
    ours = model_gradients()
    set_fused_kernels("none")
    for one, other in zip(ours, model_gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_inference_equals_training() -> None:
    layer = DroplessMoE(tiny_config()).to(DEVICE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x_BSD = leaf(2, 9, 32)
    trained_BSD, _ = layer(x_BSD)
    with torch.inference_mode():
        inferred_BSD, statistics = layer(x_BSD)
    assert statistics is None and torch.equal(inferred_BSD, trained_BSD)


def test_a_fused_layer_reads_and_writes_few_bytes() -> None:
    traffic = traffic_of_a_layer()
    # Rows: gathered 4, combined 2 and 4 back, gradients of two products added 6, summed 2.
    assert traffic.bytes["RD"] <= 18
    # Hidden units: 6 for the activation, 10 for its gradients, which is the least there is.
    assert traffic.bytes["RF"] <= 16
    assert traffic.bytes["TD"] <= 24
