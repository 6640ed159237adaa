"""Moving rows to experts and back against plain indexing, and the experts' kernels against each
other; values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.model.config import ClampedSwiGLUConfig, SwiGLUConfig
from pretrain.model.feed_forward import ClampedSwiGLU, SwiGLU
from pretrain.model.moe.dispatch import (
    combine,
    gather_tokens,
    group_arrived,
    group_rows,
    permute_rows,
)
from pretrain.model.moe.experts import (
    ExpertBiases,
    ExpertForm,
    Experts,
    experts_auto,
    experts_grouped_mm,
    experts_loop,
    zero_where_no_rows,
)
from tests.support.tiny_model import random_tensor

T, K, D, F, E = 13, 3, 16, 24, 5


@pytest.fixture
def orders() -> tuple[torch.Tensor, torch.Tensor]:
    ids_TK = torch.stack(
        [
            torch.randperm(E, generator=torch.Generator().manual_seed(token))[:K]
            for token in range(T)
        ]
    )
    return group_rows(ids_TK.flatten(), E)[:2]


def gradients_of(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(
        torch.autograd.grad(
            (output * random_tensor(*output.shape, seed=99).to(output.dtype)).sum(), inputs
        )
    )


def assert_all_close(
    ours: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-5
) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("num_experts", [3, 4, 40_000])
def test_rows_are_grouped_in_their_order_and_counted(num_experts: int) -> None:
    last = num_experts - 1
    order_R, inverse_R, counts_E = group_rows(torch.tensor([last, 0, last, 1, 0]), num_experts)
    assert order_R.tolist() == [1, 4, 3, 0, 2]
    assert order_R[inverse_R].tolist() == [0, 1, 2, 3, 4]
    assert counts_E.tolist() == [2, 1, *[0] * (num_experts - 3), 2]


def test_no_rows_are_grouped_too() -> None:
    assert group_rows(torch.empty(0, dtype=torch.int64), 3).counts_E.tolist() == [0, 0, 0]


def test_gathered_tokens_equal_plain_indexing(orders: tuple[torch.Tensor, torch.Tensor]) -> None:
    order_R, inverse_R = orders
    x_TD = random_tensor(T, D)
    ours, expected = gather_tokens(x_TD, order_R, inverse_R, K), x_TD[order_R // K]
    assert torch.equal(ours, expected)
    assert_all_close(gradients_of(ours, [x_TD]), gradients_of(expected, [x_TD]))


def test_permuted_rows_equal_plain_indexing(orders: tuple[torch.Tensor, torch.Tensor]) -> None:
    order_R, inverse_R = orders
    rows_RD = random_tensor(T * K, D)
    ours, expected = permute_rows(rows_RD, order_R, inverse_R), rows_RD[order_R]
    assert torch.equal(ours, expected)
    assert torch.equal(gradients_of(ours, [rows_RD])[0], gradients_of(expected, [rows_RD])[0])


def test_combined_rows_equal_a_weighted_index_add(
    orders: tuple[torch.Tensor, torch.Tensor],
) -> None:
    order_R, inverse_R = orders
    rows_RD, weights_TK = random_tensor(T * K, D), random_tensor(T, K, seed=1)
    ours = combine(rows_RD, order_R=order_R, inverse_R=inverse_R, weights_TK=weights_TK)
    expected = torch.zeros(T, D).index_add(
        0, order_R // K, rows_RD * weights_TK.flatten()[order_R, None]
    )
    assert_all_close(
        [ours, *gradients_of(ours, [rows_RD, weights_TK])],
        [expected, *gradients_of(expected, [rows_RD, weights_TK])],
    )


def test_second_derivatives_of_the_weighted_sum_are_those_of_the_definition(
    orders: tuple[torch.Tensor, torch.Tensor],
) -> None:
    order_R, inverse_R = orders

    def curvature(combined: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        first = torch.autograd.grad(combined.square().sum(), inputs, create_graph=True)
        return gradients_of(torch.cat([one.flatten() for one in first]), inputs)

    inputs = [random_tensor(T * K, D), random_tensor(T, K, seed=1)]
    rows_RD, weights_TK = inputs
    ours = combine(rows_RD, order_R=order_R, inverse_R=inverse_R, weights_TK=weights_TK)
    expected = torch.zeros(T, D).index_add(
        0, order_R // K, rows_RD * weights_TK.flatten()[order_R, None]
    )
    assert_all_close(curvature(ours, inputs), curvature(expected, inputs), tolerance=1e-4)


def test_a_wrong_inverse_permutation_is_told_apart(
    orders: tuple[torch.Tensor, torch.Tensor],
) -> None:
    order_R, _ = orders
    rows_RD, weights_TK = random_tensor(T * K, D), random_tensor(T, K, seed=1)
    wrong = combine(rows_RD, order_R=order_R, inverse_R=order_R, weights_TK=weights_TK)
    expected = torch.zeros(T, D).index_add(
        0, order_R // K, rows_RD * weights_TK.flatten()[order_R, None]
    )
    assert (wrong - expected).abs().max() > 0.1


def test_combine_adds_bf16_rows_in_fp32() -> None:
    """256 + 1 + 1 is 256 when bf16 sums are rounded one by one, 258 when they are rounded once."""
    rows_RD, weights_TK = (
        torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16),
        torch.ones(1, 3),
    )
    identity = torch.arange(3)
    assert (
        combine(rows_RD, order_R=identity, inverse_R=identity, weights_TK=weights_TK).item()
        == 258.0
    )


def test_rows_from_several_ranks_are_grouped_by_local_expert() -> None:
    counts_Pe = torch.tensor([[2, 0, 1], [1, 3, 0]])
    names = ["p0e0", "p0e0", "p0e2", "p1e0", "p1e1", "p1e1", "p1e1"]
    order_R, inverse_R, counts_e = group_arrived(counts_Pe, num_rows=7)
    assert [names[row] for row in order_R] == [
        "p0e0",
        "p0e0",
        "p1e0",
        "p1e1",
        "p1e1",
        "p1e1",
        "p0e2",
    ]
    assert order_R[inverse_R].tolist() == list(range(7))
    assert counts_e.tolist() == [3, 3, 1]


FORMS = {
    "swiglu": ExpertForm(SwiGLU, SwiGLUConfig()),
    "biased clamped_swiglu": ExpertForm(
        ClampedSwiGLU, ClampedSwiGLUConfig(kind="clamped_swiglu", bias=True)
    ),
}


def named(weights: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The three matrices of experts as arguments."""
    return dict(zip(("w1_eXD", "w2_eDF", "w3_eXD"), weights, strict=True))


def experts_naive(
    x_RD: torch.Tensor,
    counts_e: torch.Tensor,
    *,
    w1_eXD: torch.Tensor,
    w2_eDF: torch.Tensor,
    w3_eXD: torch.Tensor,
    form: ExpertForm,
    biases: ExpertBiases | None = None,
) -> torch.Tensor:
    """One row after the other."""
    w1, w2, w3 = w1_eXD, w2_eDF, w3_eXD
    rows = []
    b1, b3, b2 = biases or (torch.zeros(E, 1, dtype=x_RD.dtype),) * 3
    for x, e in zip(x_RD, torch.arange(len(counts_e)).repeat_interleave(counts_e)):
        rows.append(w2[e] @ form.hidden(w1[e] @ x + b1[e], w3[e] @ x + b3[e]) + b2[e])
    return torch.stack(rows)


COUNTS = {
    "mixed": [7, 0, 1, 12, 0],
    "one_expert_has_all": [0, 0, 20, 0, 0],
    "even": [4, 4, 4, 4, 4],
}


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_expert_kernels_agree_with_gradients(
    name: str, dtype: torch.dtype, tolerance: float, kind: str
) -> None:
    counts_e, form = torch.tensor(COUNTS[name]), FORMS[kind]
    x_RD, weights = (
        random_tensor(20, D, dtype=dtype),
        [
            random_tensor(E, *shape, seed=seed)
            for seed, shape in enumerate([(F, D), (D, F), (F, D)])
        ],
    )
    low = [(weight.detach() * 0.3).to(dtype).requires_grad_() for weight in weights]
    biases = (
        ExpertBiases(*(random_tensor(E, rows, seed=9, dtype=dtype) for rows in (F, F, D)))
        if form.config.bias
        else None
    )
    leaves = [x_RD, *low, *(biases or ())]
    results = {}
    for compute in (experts_naive, experts_loop, experts_grouped_mm):
        output_RD = compute(x_RD, counts_e, **named(low), form=form, biases=biases)
        results[compute] = [output_RD, *gradients_of(output_RD, leaves)]
        assert output_RD.dtype == dtype
    assert_all_close(results[experts_loop], results[experts_naive], tolerance)
    assert_all_close(results[experts_grouped_mm], results[experts_naive], tolerance)
    for weight_gradient in results[experts_loop][2:5]:
        assert weight_gradient[counts_e == 0].count_nonzero() == 0


def test_in_bf16_on_a_cpu_both_kernels_compute_the_same_bits() -> None:
    """So the choice of ``auto`` changes no loss."""
    x_RD = random_tensor(20, D, dtype=torch.bfloat16)
    weights = [
        random_tensor(E, *shape, seed=seed, dtype=torch.bfloat16)
        for seed, shape in enumerate([(F, D), (D, F), (F, D)])
    ]
    results = []
    for compute in (experts_loop, experts_grouped_mm):
        output_RD = compute(
            x_RD, torch.tensor(COUNTS["mixed"]), **named(weights), form=FORMS["swiglu"]
        )
        results.append([output_RD, *gradients_of(output_RD, [x_RD, *weights])])
    assert all(map(torch.equal, *results))


def test_auto_is_the_grouped_product_in_training_only() -> None:
    experts = Experts(
        *map(nn.Parameter, [torch.zeros(1, 1, 1)] * 3), FORMS["swiglu"], experts_auto, 0
    )
    for dtype, training, expected in (
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, False),
        (torch.float32, True, True),
        (torch.float16, True, False),
    ):
        with torch.set_grad_enabled(training):
            assert experts.is_grouped(torch.zeros(1, 1, dtype=dtype)) is expected


def test_auto_is_the_loop_on_cuda_for_sizes_that_its_kernel_does_not_take() -> None:
    class OnCuda:
        """What the choice reads of a tensor on CUDA."""

        dtype, is_cuda = torch.bfloat16, True

    x: Any = OnCuda()
    for experts, rows, columns, expected in (
        (2, 8, 16, True),
        (2, 12, 16, False),
        (2, 8, 4, False),
    ):
        w1, w2 = torch.zeros(experts, rows, columns), torch.zeros(experts, columns, rows)
        module = Experts(*map(nn.Parameter, (w1, w2, w1)), FORMS["swiglu"], experts_auto, 0)
        assert module.is_grouped(x) is expected
    many = nn.Parameter(torch.zeros(1024, 8, 8))
    assert not Experts(many, many, many, FORMS["swiglu"], experts_auto, 0).is_grouped(x)


def test_gradients_of_experts_without_rows_can_be_cleared() -> None:
    gradient = torch.ones(4, 2, 3)
    cleared = zero_where_no_rows(gradient, torch.tensor([2, 2, 5, 5], dtype=torch.int32))
    assert cleared[:, 0, 0].tolist() == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("rows", [20, 0])
def test_the_grouped_product_is_one_compiled_graph(rows: int, kind: str) -> None:
    form = FORMS[kind]
    dtype = torch.bfloat16
    x_RD = random_tensor(rows, D, dtype=dtype)
    shapes = [(F, D), (D, F), (F, D)]
    weights = [random_tensor(E, *shape, seed=s, dtype=dtype) for s, shape in enumerate(shapes)]
    biases = (
        ExpertBiases(*(random_tensor(E, width, seed=9, dtype=dtype) for width in (F, F, D)))
        if form.config.bias
        else None
    )
    counts_e = torch.tensor(COUNTS["mixed"]) * (rows // 20)

    def compute(x_RD: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        return experts_grouped_mm(x_RD, counts_e, **named(weights), form=form, biases=biases)

    torch._dynamo.reset()
    traced = torch.compile(compute, backend="aot_eager", fullgraph=True, dynamic=True)
    eager_RD, traced_RD = compute(x_RD, weights), traced(x_RD, weights)
    assert traced_RD.shape == (rows, D)
    leaves = [x_RD, *weights, *(biases or ())]
    assert_all_close(
        [traced_RD, *gradients_of(traced_RD, leaves)],
        [eager_RD, *gradients_of(eager_RD, leaves)],
        tolerance=0.05,
    )


def test_experts_without_any_row_have_gradients_of_zeros() -> None:
    weights = [random_tensor(E, *shape) for shape in ((F, D), (D, F), (F, D))]
    x_RD = random_tensor(0, D)
    y_RD = experts_grouped_mm(
        x_RD, torch.zeros(E, dtype=torch.long), **named(weights), form=FORMS["swiglu"]
    )
    gradients = gradients_of(y_RD, [x_RD, *weights])
    assert [one.shape for one in gradients] == [x_RD.shape, *(one.shape for one in weights)]
    assert all(one.count_nonzero() == 0 for one in gradients)


def test_rows_of_a_neighbouring_expert_are_told_apart() -> None:
    weights = [
        random_tensor(E, F, D),
        random_tensor(E, D, F, seed=1),
        random_tensor(E, F, D, seed=2),
    ]
    x_RD = random_tensor(20, D, seed=3)
    right = experts_naive(
        x_RD, torch.tensor([4, 4, 4, 4, 4]), **named(weights), form=FORMS["swiglu"]
    )
    shifted = experts_loop(
        x_RD, torch.tensor([5, 3, 4, 4, 4]), **named(weights), form=FORMS["swiglu"]
    )
    assert ((right - shifted).abs().amax(dim=1) > 1.0).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compute", [experts_loop, experts_grouped_mm])
def test_experts_that_no_token_chose_answer_with_no_rows(
    compute: Callable[..., torch.Tensor], training: bool
) -> None:
    weights = [
        random_tensor(E, F, D),
        random_tensor(E, D, F, seed=1),
        random_tensor(E, F, D, seed=2),
    ]
    with torch.set_grad_enabled(training):
        assert compute(
            random_tensor(0, D),
            torch.zeros(E, dtype=torch.long),
            **named(weights),
            form=FORMS["swiglu"],
        ).shape == (0, D)
