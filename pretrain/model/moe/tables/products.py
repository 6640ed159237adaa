"""Products of tokens with the rows of a large table that each of them chose, forward and backward.

Two products are each other's derivative, so that three ways to compute them serve every pass:

* ``row_dots``: c_p = table[row_p] . x_t for each pair p of a token t and a row;
* ``weighted_rows``: y_t = sum over the pairs p of t of c_p table[row_p].

The gradient of a row is a weighted sum too, of the tokens that chose it. It is kept as
:class:`Factors`, which are small, until somebody asks for rows. Everything here is fp32: rows are
read, not multiplied with matrices, and memory is the limit.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from pretrain.model.fp32 import KeepsFp32
from pretrain.model.moe.tables.interface import Bags, TableKernel

# torch says so once a process of every sparse matrix in this format; two dense results are all that
# is taken from it here.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def _plain_row_dots(x_TD: torch.Tensor, table_ND: torch.Tensor, bags: Bags) -> torch.Tensor:
    return (table_ND[bags.row_P] * x_TD[bags.owners()]).sum(dim=-1)


def _plain_weighted_rows(c_P: torch.Tensor, table_ND: torch.Tensor, bags: Bags) -> torch.Tensor:
    zeros_TD = table_ND.new_zeros(bags.offsets_T1.numel() - 1, table_ND.shape[1])
    return zeros_TD.index_add(0, bags.owners(), c_P[:, None] * table_ND[bags.row_P])


def _bag_row_dots(x_TD: torch.Tensor, table_ND: torch.Tensor, bags: Bags) -> torch.Tensor:
    """By torch's product of dense matrices at the places of a sparse one: no row is copied."""
    if bags.row_P.numel() == 0:
        return x_TD.new_zeros(0)
    size = (x_TD.shape[0], table_ND.shape[0])
    if (
        bags.row_P.numel() > size[0] * size[1]
    ):  # duplicates: more pairs than places in the matrix, which torch refuses
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
    return functional.embedding_bag(
        bags.row_P,
        table_ND,
        bags.offsets_T1,
        per_sample_weights=c_P,
        mode="sum",
        include_last_offset=True,
    )


# The plain definition, which copies every chosen row; and torch's own products, which do not.
PLAIN = TableKernel(_plain_row_dots, _plain_weighted_rows)
BAGS = TableKernel(_bag_row_dots, _bag_weighted_rows)


def kernel_named(name: str, device: torch.device) -> TableKernel:
    """``plain``, ``bags``, ``triton``, or for ``auto`` the fastest on ``device``."""
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        # Triton is an optional package, which only CUDA has a use for.
        from pretrain.model.moe.tables.products_triton import TRITON

        return TRITON
    return PLAIN if name == "plain" else BAGS


class Factors(NamedTuple):
    """A gradient of a table: row ``row_P[p]`` of it is the sum of ``c_P[p] * x_TD[owner_P[p]]``
    over the pairs p with that row.
    """

    row_P: torch.Tensor
    owner_P: torch.Tensor
    c_P: torch.Tensor
    x_TD: torch.Tensor


class SortedFactors:
    """Factors in the order of their rows: each row's gradient is one weighted sum, in the order of
    the pairs, so it is deterministic.

    Attributes:
        row_U: the different rows, ascending, [U] int64.
    """

    def __init__(self, factors: Factors, kernel: TableKernel) -> None:
        row_P, order_P = factors.row_P.sort(stable=True)
        self.row_U, counts_U = row_P.unique_consecutive(return_counts=True)
        self._owner_P, self._c_P, self._x_TD, self._kernel = (
            factors.owner_P[order_P],
            factors.c_P[order_P],
            factors.x_TD,
            kernel,
        )
        self._offsets_U1 = functional.pad(counts_U.cumsum(0), (1, 0))

    def gradient(self, rows: slice) -> torch.Tensor:
        """The gradients of ``row_U[rows]``, [rows, D]."""
        offsets = self._offsets_U1[rows.start : rows.stop + 1]
        first, last = (int(offset) for offset in offsets[[0, -1]])
        return self._kernel.weighted_rows(
            self._c_P[first:last], self._x_TD, Bags(self._owner_P[first:last], offsets - first)
        )


class ExpertTable(KeepsFp32):
    """A table of rows in fp32, [N, width, D] for N experts, whose gradient is dense or, where many
    more rows are held than used, collected.

    As built, ``weight`` is a parameter like any other and autograd gives it a dense gradient.
    :meth:`collect` takes it out of the module's parameters: from then on each backward pass appends
    its factors to ``collected``, for an optimizer that touches those rows alone.
    """

    def __init__(self, num_experts: int, width: int, hidden_size: int) -> None:
        super().__init__()
        self.weight: torch.Tensor = nn.Parameter(torch.empty(num_experts, width, hidden_size))
        # The mark of experts: each rank may hold others.
        self.weight.allreduce = False  # type: ignore[attr-defined]
        self.width = width
        self.collected: list[Factors] | None = None

    def collect(self, device: torch.device) -> None:
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.weight, self.collected = weight.detach().to(device), []

    def dots(self, x_TD: torch.Tensor, bags: Bags, kernel: TableKernel) -> torch.Tensor:
        """[T, D] -> the products of each pair's token with the rows of its expert, [P, width]."""
        dots: torch.Tensor = _RowDots.apply(
            x_TD, self.weight, bags.widened(self.width), self, kernel
        )
        return dots.view(-1, self.width)

    def weighted(self, c_PX: torch.Tensor, bags: Bags, kernel: TableKernel) -> torch.Tensor:
        """[P, width] -> for each token the sum of its experts' rows, weighted, [T, D]."""
        y_TD: torch.Tensor = _WeightedRows.apply(
            c_PX.reshape(-1), self.weight, bags.widened(self.width), self, kernel
        )
        return y_TD

    def take_gradient(
        self, factors: Factors, wanted: bool, kernel: TableKernel
    ) -> torch.Tensor | None:
        """What a backward pass returns for the weight: dense where autograd wants one, else
        nothing, and the factors are kept.
        """
        if not wanted:
            if self.collected is not None:
                self.collected.append(factors)
            return None
        gradient = torch.zeros_like(self.weight)
        by_row = SortedFactors(factors, kernel)
        gradient.view(-1, gradient.shape[-1])[by_row.row_U] = by_row.gradient(
            slice(0, by_row.row_U.numel())
        )
        return gradient


class _RowDots(torch.autograd.Function):
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
        ctx.table, ctx.kernel = table, kernel
        return kernel.row_dots(x_TD, weight_NXD.flatten(0, 1), bags)

    @staticmethod
    def backward(ctx: Any, grad_P: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, weight_NXD, *bag = ctx.saved_tensors
        bags, grad_P = Bags(*bag), grad_P.contiguous()
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
        ctx.table, ctx.kernel = table, kernel
        return kernel.weighted_rows(c_P, weight_NXD.flatten(0, 1), bags)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        c_P, weight_NXD, *bag = ctx.saved_tensors
        bags, grad_TD = Bags(*bag), grad_TD.contiguous()
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
