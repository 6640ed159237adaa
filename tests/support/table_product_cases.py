"""Choices of rows, and everything a table computes from one: both products and their gradients,
dense and collected.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn import functional

from pretrain.model.moe.tables.interface import Bags, TableKernel
from pretrain.model.moe.tables.products import ExpertTable, Factors, SortedFactors

# Lengths of the bags and rows to choose from: ordinary, empty, duplicates everywhere, nothing at
# all, longer than one program sums.
CHOICES = {
    "ordinary": ([3, 5, 1, 4], 9),
    "empty_bags": ([0, 4, 0, 0, 2, 0], 5),
    "duplicates": ([6, 3, 8], 2),
    "one_bag_longer_than_the_table": ([9, 0, 0, 1], 4),
    "no_pairs": ([0, 0, 0], 4),
    "no_tokens": ([], 4),
    "long_bags": ([300, 0, 3, 128, 129, 1], 12),
    "hot_row": ([2, 260, 1], 1),
}


class Case(NamedTuple):
    x_TD: torch.Tensor
    table_NXD: torch.Tensor
    c_PX: torch.Tensor
    bags: Bags


def random_case(
    lengths: list[int], num_rows: int, D: int, width: int = 1, seed: int = 0, device: str = "cpu"
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    P, length_T = sum(lengths), torch.tensor(lengths, dtype=torch.int64)
    row_P = torch.randint(0, num_rows, (P,), generator=generator)
    x_TD, table_NXD, c_PX = (
        torch.randn(size, generator=generator)
        for size in ((len(lengths), D), (num_rows, width, D), (P, width))
    )
    bags = Bags(row_P.to(device), functional.pad(length_T.cumsum(0), (1, 0)).to(device))
    return Case(x_TD.to(device), table_NXD.to(device), c_PX.to(device), bags)


def one_by_one(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Both products, [P, X] and [T, D], by a loop over tokens and their pairs; differentiable."""
    offsets = case.bags.offsets_T1.tolist()
    dots, sums = [], []
    for token, (first, last) in enumerate(pairwise(offsets)):
        sums.append(torch.zeros_like(case.x_TD[token]))
        for pair in range(first, last):
            rows_XD = case.table_NXD[case.bags.row_P[pair]]
            dots.append(rows_XD @ case.x_TD[token])
            sums[-1] = sums[-1] + case.c_PX[pair] @ rows_XD
    return torch.stack(dots) if dots else case.c_PX * 0.0, torch.stack(
        sums
    ) if sums else case.x_TD * 0.0


def table_of(case: Case) -> ExpertTable:
    table = ExpertTable(*case.table_NXD.shape).to(case.table_NXD.device)
    with torch.no_grad():
        table.weight.copy_(case.table_NXD)
    return table


def _loss(dots_PX: torch.Tensor, y_TD: torch.Tensor) -> torch.Tensor:
    """One that gives each number a gradient of its own."""
    return sum(
        (
            (
                values * torch.arange(values.numel(), device=values.device).view_as(values).sin()
            ).sum()
            for values in (dots_PX, y_TD)
        ),
        torch.zeros(()),
    )


def expected(case: Case) -> dict[str, torch.Tensor]:
    """What :func:`computed` should give, by autograd through the loop."""
    case = Case(*(tensor.detach().double().requires_grad_() for tensor in case[:3]), case.bags)
    dots_PX, y_TD = one_by_one(case)
    gradients = torch.autograd.grad(_loss(dots_PX, y_TD), case[:3], materialize_grads=True)
    named = dict(zip(("grad_x", "grad_table", "grad_c"), gradients, strict=True))
    return (
        {"dots": dots_PX.detach(), "weighted": y_TD.detach()}
        | named
        | {"grad_collected": named["grad_table"]}
    )


def computed(case: Case, kernel: TableKernel) -> dict[str, torch.Tensor]:
    """Both products by a table with ``kernel``, and the gradients of their loss; the table's also
    from collected factors.
    """
    table = table_of(case)
    x_TD, c_PX = case.x_TD.clone().requires_grad_(), case.c_PX.clone().requires_grad_()
    dots_PX, y_TD = table.dots(x_TD, case.bags, kernel), table.weighted(c_PX, case.bags, kernel)
    gradients = torch.autograd.grad(_loss(dots_PX, y_TD), [x_TD, table.weight, c_PX])
    table.collect(case.x_TD.device)
    _loss(table.dots(x_TD, case.bags, kernel), table.weighted(c_PX, case.bags, kernel)).backward()
    assert table.collected is not None and len(table.collected) == 2
    collected_ND = sum(
        (dense(factors, table.weight, kernel) for factors in table.collected),
        torch.zeros_like(table.weight),
    )
    named = dict(zip(("grad_x", "grad_table", "grad_c"), gradients, strict=True))
    return (
        {"dots": dots_PX.detach(), "weighted": y_TD.detach()}
        | named
        | {"grad_collected": collected_ND}
    )


def dense(factors: Factors, weight_NXD: torch.Tensor, kernel: TableKernel) -> torch.Tensor:
    """The gradient that factors stand for, computed in two chunks of rows, as an optimizer does."""
    gradient = torch.zeros_like(weight_NXD)
    by_row = SortedFactors(factors, kernel)
    rows, middle = by_row.row_U.numel(), by_row.row_U.numel() // 2
    for chunk in (slice(0, middle), slice(middle, rows)):
        gradient.flatten(0, 1)[by_row.row_U[chunk]] = by_row.gradient(chunk)
    return gradient


def assert_same(
    got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    """Equal up to ``tolerance`` times each tensor's largest number."""
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        assert value.shape == wanted[name].shape, name
        if value.numel():
            scale = wanted[name].abs().max().item()
            torch.testing.assert_close(
                value.double(),
                wanted[name].double(),
                rtol=0.0,
                atol=tolerance * scale,
                msg=lambda text, name=name: f"{name}: {text}",
            )
