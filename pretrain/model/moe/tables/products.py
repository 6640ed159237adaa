"""Products of tokens with the table rows that each of them chose, forward and backward.

Two products are each other's derivative, so one kernel with both serves every pass:

* ``row_dots``: c_p = table[row_p] . x_t for each pair p of a token t and a row;
* ``weighted_rows``: y_t = sum over the pairs p of t of c_p table[row_p].

The gradient of a row is a weighted sum too, of the tokens that chose it. It is kept as
:class:`Factors`, which are small, until an optimizer asks for rows. Everything here is fp32: rows
are read once and not reused as in a matrix product, so memory bandwidth is the limit.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from pretrain.model.fp32 import KeepsFp32
from pretrain.model.moe.tables.interface import Bags, TableKernel

# torch warns once per process about its CSR format. Only a dense result is read from it here.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def _plain_row_dots(x_TD: torch.Tensor, table_ND: torch.Tensor, bags: Bags) -> torch.Tensor:
    return (table_ND[bags.row_P] * x_TD[bags.owners()]).sum(dim=-1)


def _plain_weighted_rows(c_P: torch.Tensor, table_ND: torch.Tensor, bags: Bags) -> torch.Tensor:
    zeros_TD = table_ND.new_zeros(bags.offsets_T1.numel() - 1, table_ND.shape[1])
    return zeros_TD.index_add(0, bags.owners(), c_P[:, None] * table_ND[bags.row_P])


def _bag_row_dots(x_TD: torch.Tensor, table_ND: torch.Tensor, bags: Bags) -> torch.Tensor:
    """By torch's sampled product of dense matrices, which copies no row."""
    if bags.row_P.numel() == 0:
        return x_TD.new_zeros(0)
    size = (x_TD.shape[0], table_ND.shape[0])
    # Duplicates: torch refuses a sparse matrix with more entries than elements.
    if bags.row_P.numel() > size[0] * size[1]:
        return (x_TD @ table_ND.t())[bags.owners(), bags.row_P]
    pattern = torch.sparse_csr_tensor(
        bags.offsets_T1,
        bags.row_P,
        x_TD.new_zeros(bags.row_P.numel()),
        size,
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, x_TD, table_ND.t(), beta=0.0).values()


def _bag_weighted_rows(c_P: torch.Tensor, table_ND: torch.Tensor, bags: Bags) -> torch.Tensor:
    # include_last_offset: offsets are [T + 1], as in CSR.
    return functional.embedding_bag(
        bags.row_P,
        table_ND,
        bags.offsets_T1,
        per_sample_weights=c_P,
        mode="sum",
        include_last_offset=True,
    )


# The plain definition copies every chosen row; torch's own products do not.
PLAIN = TableKernel(_plain_row_dots, _plain_weighted_rows)
BAGS = TableKernel(_bag_row_dots, _bag_weighted_rows)


def kernel_named(name: str, device: torch.device) -> TableKernel:
    """The kernel ``plain``, ``bags`` or ``triton``; for ``auto`` the fastest one on ``device``."""
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        # Triton is an optional package, which only CUDA has a use for.
        from pretrain.model.moe.tables.products_triton import TRITON

        return TRITON
    return PLAIN if name == "plain" else BAGS


class Factors(NamedTuple):
    """The gradient of a table, as the pairs that it is the sum of.

    Row ``row_P[p]`` of the gradient is the sum of ``c_P[p] * x_TD[owner_P[p]]`` over its pairs p.
    """

    row_P: torch.Tensor
    owner_P: torch.Tensor
    c_P: torch.Tensor
    x_TD: torch.Tensor


class SortedFactors:
    """Factors sorted by row: each row's gradient is one weighted sum over neighbouring pairs.

    The sort is stable, so the order of summation is that of the pairs, and the result
    deterministic.

    Attributes:
        row_U: the different rows, ascending, [U] int64.
    """

    def __init__(self, factors: Factors, kernel: TableKernel) -> None:
        row_P, order_P = factors.row_P.sort(stable=True)
        self.row_U, counts_U = row_P.unique_consecutive(return_counts=True)
        self._owner_P = factors.owner_P[order_P]
        self._c_P = factors.c_P[order_P]
        self._x_TD = factors.x_TD
        self._kernel = kernel
        self._offsets_U1 = functional.pad(counts_U.cumsum(0), (1, 0))

    def gradient(self, rows: slice) -> torch.Tensor:
        """The gradients of ``row_U[rows]``, [rows, D]."""
        offsets = self._offsets_U1[rows.start : rows.stop + 1]
        # One transfer to the host per chunk: slices need integers.
        first, last = (int(offset) for offset in offsets[[0, -1]])
        return self._kernel.weighted_rows(
            self._c_P[first:last], self._x_TD, Bags(self._owner_P[first:last], offsets - first)
        )


class ExpertTable(KeepsFp32):
    """A table of N experts in fp32, [N, width, D], whose gradient is dense or collected as factors.

    As built, ``weight`` is a parameter like any other and autograd gives it a dense gradient.
    :meth:`collect` removes it from the module's parameters, for tables of which a step uses few
    rows: from then on each backward pass appends its factors to ``collected``, for a sparse
    optimizer.
    """

    def __init__(self, num_experts: int, width: int, hidden_size: int) -> None:
        super().__init__()
        self.weight: torch.Tensor = nn.Parameter(torch.empty(num_experts, width, hidden_size))
        # DeepSpeed's mark of experts: ranks may hold different ones, so it must not average them.
        self.weight.allreduce = False  # type: ignore[attr-defined]
        self.width = width
        self.collected: list[Factors] | None = None

    def collect(self, device: torch.device) -> None:
        """Remove ``weight`` from the parameters, and collect factors from now on.

        The table moves to ``device`` here, because DeepSpeed no longer sees it.
        """
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.weight = weight.detach().to(device)
        self.collected = []

    def dots(self, x_TD: torch.Tensor, bags: Bags, kernel: TableKernel) -> torch.Tensor:
        """[T, D] -> the products of each pair's token with its expert's rows, [P, width]."""
        dots: torch.Tensor = _RowDots.apply(
            x_TD, self.weight, bags.widened(self.width), self, kernel
        )
        return dots.view(-1, self.width)

    def weighted(self, c_PX: torch.Tensor, bags: Bags, kernel: TableKernel) -> torch.Tensor:
        """[P, width] -> each token's weighted sum of its experts' rows, [T, D]."""
        y_TD: torch.Tensor = _WeightedRows.apply(
            c_PX.reshape(-1), self.weight, bags.widened(self.width), self, kernel
        )
        return y_TD

    def take_gradient(
        self, factors: Factors, wanted: bool, kernel: TableKernel
    ) -> torch.Tensor | None:
        """The return value of a backward pass for the weight.

        A dense gradient if autograd wants one; else None, and the factors are collected.
        """
        if not wanted:
            if self.collected is not None:
                self.collected.append(factors)
            return None
        # row_U has no duplicates, so a plain assignment is enough.
        gradient = torch.zeros_like(self.weight)
        by_row = SortedFactors(factors, kernel)
        gradient.view(-1, gradient.shape[-1])[by_row.row_U] = by_row.gradient(
            slice(0, by_row.row_U.numel())
        )
        return gradient


class _RowDots(torch.autograd.Function):
    """``row_dots`` with ``weighted_rows`` as its derivative by the tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        weight_NXD: torch.Tensor,
        bags: Bags,
        table: ExpertTable,
        kernel: TableKernel,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD, weight_NXD.detach(), *bags)
        ctx.table = table
        ctx.kernel = kernel
        return kernel.row_dots(x_TD, weight_NXD.flatten(0, 1), bags)

    @staticmethod
    def backward(ctx: Any, grad_P: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, weight_NXD, *bag = ctx.saved_tensors
        # Autograd may pass an expanded gradient, and kernels index it flat.
        bags = Bags(*bag)
        grad_P = grad_P.contiguous()
        grad_x_TD = (
            ctx.kernel.weighted_rows(grad_P, weight_NXD.flatten(0, 1), bags)
            if ctx.needs_input_grad[0]
            else None
        )
        factors = Factors(bags.row_P, bags.owners(), grad_P, x_TD)
        return (
            grad_x_TD,
            ctx.table.take_gradient(factors, ctx.needs_input_grad[1], ctx.kernel),
            None,
            None,
            None,
        )


class _WeightedRows(torch.autograd.Function):
    """``weighted_rows`` with ``row_dots`` as its derivative by the coefficients."""

    @staticmethod
    def forward(
        ctx: Any,
        c_P: torch.Tensor,
        weight_NXD: torch.Tensor,
        bags: Bags,
        table: ExpertTable,
        kernel: TableKernel,
    ) -> torch.Tensor:
        ctx.save_for_backward(c_P, weight_NXD.detach(), *bags)
        ctx.table = table
        ctx.kernel = kernel
        return kernel.weighted_rows(c_P, weight_NXD.flatten(0, 1), bags)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        c_P, weight_NXD, *bag = ctx.saved_tensors
        # Autograd may pass an expanded gradient, and kernels index it flat.
        bags = Bags(*bag)
        grad_TD = grad_TD.contiguous()
        grad_c_P = (
            ctx.kernel.row_dots(grad_TD, weight_NXD.flatten(0, 1), bags)
            if ctx.needs_input_grad[0]
            else None
        )
        factors = Factors(bags.row_P, bags.owners(), c_P, grad_TD)
        return (
            grad_c_P,
            ctx.table.take_gradient(factors, ctx.needs_input_grad[1], ctx.kernel),
            None,
            None,
            None,
        )
