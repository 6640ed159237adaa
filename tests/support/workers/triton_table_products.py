"""The Triton kernels against the plain products; run by test_row_products in a process of its own.

Where there is no CUDA, Triton's interpreter computes them, and that has to be decided before
anything imports Triton.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pretrain.config.load import load_recipe
from pretrain.model.moe.peer import PEER
from pretrain.model.moe.tables import products_triton as row_products_triton
from pretrain.model.moe.tables.interface import Bags, TableKernel
from pretrain.model.moe.tables.products import PLAIN
from pretrain.model.moe.tables.products_triton import TRITON
from tests.support.table_product_cases import CHOICES, assert_same, computed, random_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("choice", CHOICES)
def test_products_and_gradients_equal_the_plain_ones(choice: str) -> None:
    case = random_case(*CHOICES[choice], D=33, device=DEVICE)
    assert_same(computed(case, TRITON), computed(case, PLAIN))


@pytest.mark.parametrize("D", [1, 700])
def test_rows_may_be_of_any_size(D: int) -> None:
    case = random_case([5, 0, 7], 7, D, device=DEVICE)
    assert_same(computed(case, TRITON), computed(case, PLAIN))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 9), max_size=4),
    st.integers(1, 12),
    st.integers(1, 70),
    st.integers(1, 2),
    st.integers(0, 99),
)
def test_random_choices_equal_the_plain_ones(
    lengths: list[int], num_rows: int, D: int, width: int, seed: int
) -> None:
    case = random_case(lengths, num_rows, D, width, seed, DEVICE)
    assert_same(computed(case, TRITON), computed(case, PLAIN))


def test_a_bag_sums_to_the_same_bits_alone_and_among_others() -> None:
    case = random_case([3, 520, 0, 290], 30, 8, device=DEVICE)
    c_P, table_ND = case.c_PX.flatten(), case.table_NXD.flatten(0, 1)
    together_TD = TRITON.weighted_rows(c_P, table_ND, case.bags)
    assert torch.equal(TRITON.weighted_rows(c_P, table_ND, case.bags), together_TD)
    offsets = case.bags.offsets_T1.tolist()
    for bag, (first, last) in enumerate(pairwise(offsets)):
        alone = Bags(
            case.bags.row_P[first:last], case.bags.offsets_T1.new_tensor([0, last - first])
        )
        assert torch.equal(
            TRITON.weighted_rows(c_P[first:last], table_ND, alone)[0], together_TD[bag]
        )


def test_tables_may_hold_more_than_2_to_the_31_numbers(tmp_path: Path) -> None:
    rows, D = 2**21 + 2, 1024
    if DEVICE == "cuda":
        table_ND = torch.zeros(rows, D, device=DEVICE)
    else:  # a file of holes, of which only the rows that are written take room
        table_ND = torch.from_file(str(tmp_path / "table"), shared=True, size=rows * D).view(
            rows, D
        )
    case = random_case([2, 3], 1, D, device=DEVICE)
    row_P = torch.tensor([rows - 1, 0, rows - 2, rows - 1, 1], device=DEVICE)
    for row in row_P.tolist():
        table_ND[row] = torch.randn(D, generator=torch.Generator().manual_seed(row))
    bags, c_P = Bags(row_P, case.bags.offsets_T1), case.c_PX.flatten()
    torch.testing.assert_close(
        TRITON.row_dots(case.x_TD, table_ND, bags),
        PLAIN.row_dots(case.x_TD, table_ND, bags),
        rtol=1e-5,
        atol=1e-3,
    )
    torch.testing.assert_close(
        TRITON.weighted_rows(c_P, table_ND, bags),
        PLAIN.weighted_rows(c_P, table_ND, bags),
        rtol=1e-5,
        atol=1e-5,
    )


class NotLaunched:
    """Stands where a kernel was, and computes nothing."""

    def __getitem__(self, grid: object) -> NotLaunched:
        return self

    def __call__(self, *arguments: object) -> None:
        pass


def test_long_bags_without_their_further_pieces_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = random_case(*CHOICES["long_bags"], D=8, device=DEVICE)
    inputs = case.c_PX.flatten(), case.table_NXD.flatten(0, 1), case.bags
    assert_same(
        {"weighted": TRITON.weighted_rows(*inputs)}, {"weighted": PLAIN.weighted_rows(*inputs)}
    )
    monkeypatch.setattr(row_products_triton, "_join_kernel", NotLaunched())
    with pytest.raises(AssertionError, match="weighted"):
        assert_same(
            {"weighted": TRITON.weighted_rows(*inputs)}, {"weighted": PLAIN.weighted_rows(*inputs)}
        )


def peer_gradients(kernel: str, feed_forward: str) -> dict[str, torch.Tensor]:
    """A whole layer's output and the gradients of its input and every parameter."""
    moe = (
        "{kind: peer, product_key_sizes: [3, 4], num_heads: 2, top_k: 3, query_dim: 8,"
        f" moe_intermediate_size: 2, expert_kernel: {kernel}}}"
    )
    model = load_recipe(
        "debug",
        [
            "model.vocab_size=100",
            f"model.moe={moe}",
            f"model.feed_forward={{kind: {feed_forward}}}",
        ],
    ).model
    generator = torch.Generator().manual_seed(0)
    layer = PEER(model)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    x_BSD = torch.randn(2, 2, model.hidden_size, generator=generator).to(DEVICE).requires_grad_()
    y_BSD, _ = layer.to(DEVICE)(x_BSD)
    y_BSD.square().sum().backward()
    assert x_BSD.grad is not None
    gradients = {
        name: parameter.grad
        for name, parameter in layer.named_parameters()
        if parameter.grad is not None
    }
    assert len(gradients) == len(list(layer.parameters()))
    return {"y": y_BSD.detach(), "x": x_BSD.grad} | gradients


@pytest.mark.parametrize("feed_forward", ["swiglu", "gelu"])
def test_a_layer_has_the_plain_kernels_gradients(feed_forward: str) -> None:
    assert_same(peer_gradients("triton", feed_forward), peer_gradients("plain", feed_forward))


def test_a_layer_whose_products_read_the_wrong_rows_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shifted(c_P: torch.Tensor, table_ND: torch.Tensor, bags: Bags) -> torch.Tensor:
        return TRITON.weighted_rows(c_P, table_ND, Bags(bags.row_P.roll(1), bags.offsets_T1))

    plain = peer_gradients("plain", "swiglu")
    monkeypatch.setattr(row_products_triton, "TRITON", TableKernel(TRITON.row_dots, shifted))
    with pytest.raises(AssertionError):
        assert_same(peer_gradients("triton", "swiglu"), plain)
