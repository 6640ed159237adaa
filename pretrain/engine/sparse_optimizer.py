"""Optimizer of tables of which a step uses few rows: its cost follows the rows used.

A row is trained by the recipe's optimizer over the steps that used it, as a parameter whose
gradient is None in all other steps: its moments do not fade meanwhile, its weight does not decay,
and Adam's bias correction counts its own steps. If every step uses every row, that is the dense
optimizer.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

import torch
from torch import distributed

from pretrain.model.moe.tables.interface import TableKernel
from pretrain.model.moe.tables.products import ExpertTable, Factors, SortedFactors, kernel_named
from pretrain.optim.config import SparseOptimizerConfig

# Rows whose gradients are in memory at once: at D = 1024, 64 MiB.
CHUNK_ROWS = 16384


class TableGroups(NamedTuple):
    """Process groups around one rank's tables; None means this process alone.

    Attributes:
        replicas: the ranks that hold the same experts. Each keeps the optimizer state of an equal
            part of the rows (as ZeRO stage 1 does).
        everyone: all ranks.
    """

    replicas: distributed.ProcessGroup | None
    everyone: distributed.ProcessGroup | None


def _lazy_zeros(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Zeros [rows, columns] fp32.

    On a CPU, a page takes memory only once a row of it is written; ``torch.zeros`` takes all of it
    at once.
    """
    if device.type != "cpu" or rows * columns == 0:
        return torch.zeros(rows, columns, device=device)
    pages = mmap.mmap(-1, 4 * rows * columns)
    # On Linux a huge page holds hundreds of rows, so that the first ones used would allocate nearly
    # everything.
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32).view(rows, columns)


class TableState:
    """Optimizer state of one table's rows ``first`` to ``last`` (excluded).

    Moments [rows, D] fp32, and how many steps used each row, [rows] int32.
    """

    def __init__(
        self, table_ND: torch.Tensor, first: int, last: int, config: SparseOptimizerConfig
    ) -> None:
        self.table_ND = table_ND
        self.first = first
        self.last = last
        self.config = config
        self.moments = {
            name: _lazy_zeros(last - first, table_ND.shape[1], table_ND.device)
            for name in config.row_moments
        }
        self.steps = torch.zeros(last - first, dtype=torch.int32, device=table_ND.device)

    def update(self, row_U: torch.Tensor, gradient_UD: torch.Tensor, learning_rate: float) -> None:
        """One optimizer step of the table's rows ``row_U``."""
        own_U = row_U - self.first
        self.steps[own_U] += 1
        # Decoupled weight decay, as in AdamW, only in the steps that use the row.
        weight_UD = self.table_ND[row_U] * (1.0 - learning_rate * self.config.weight_decay)
        # Indexing copies: moments are changed in the copy and written back.
        moments_UD = {name: moment[own_U] for name, moment in self.moments.items()}
        direction_UD = self.config.row_direction(gradient_UD, moments_UD, self.steps[own_U])
        for name, moment_UD in moments_UD.items():
            self.moments[name][own_U] = moment_UD
        # Rows are unique, so no two writes go to one row.
        self.table_ND[row_U] = weight_UD.sub_(direction_UD, alpha=learning_rate)

    def state(self) -> dict[str, torch.Tensor]:
        """The checkpoint's content: rows ever used, their steps and moments."""
        (own_U,) = self.steps.nonzero(as_tuple=True)
        state = {"row": own_U + self.first, "steps": self.steps[own_U]}
        return state | {name: moment[own_U] for name, moment in self.moments.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Replace the state by the one of a :meth:`state`.

        Rows that it does not name were never used, and moments that it lacks start at zero.
        """
        (used_U,) = self.steps.nonzero(as_tuple=True)
        # Only used rows are cleared: writing zeros to all would allocate the lazy pages.
        for state_of_rows in (self.steps, *self.moments.values()):
            state_of_rows[used_U] = 0
        own_U = state["row"].to(self.steps.device) - self.first
        self.steps[own_U] = state["steps"].to(self.steps.device)
        for name in self.moments.keys() & state.keys():
            self.moments[name][own_U] = state[name].to(self.steps.device)


class SparseOptimizer:
    """Collects what backward passes left in the tables, and updates the rows that were used.

    The result is the same on every replica. A step is :meth:`reduce`, which returns the gradient's
    norm, then :meth:`step` or :meth:`discard`.

    Args:
        tables: by name; removed from their modules' parameters here.

    Attributes:
        frozen: names of the tables that do not change; their gradients are in no norm.
    """

    def __init__(
        self,
        tables: dict[str, ExpertTable],
        config: SparseOptimizerConfig,
        groups: TableGroups,
        kernel: str,
        device: torch.device,
    ) -> None:
        self.tables = tables
        self.config = config
        self.groups = groups
        self.kernel: TableKernel = kernel_named(kernel, device)
        replicas, replica = _size_and_rank(groups.replicas)
        self.states: dict[str, TableState] = {}
        for name, table in tables.items():
            table.collect(device)
            # A view: [experts, width, D] as rows [experts * width, D].
            table_ND = table.weight.flatten(0, 1)
            rows = table_ND.shape[0]
            self.states[name] = TableState(
                table_ND, rows * replica // replicas, rows * (replica + 1) // replicas, config
            )
        self.frozen: set[str] = set()
        self._reduced: dict[str, SortedFactors] = {}

    @torch.no_grad()
    def reduce(self, scale: float) -> torch.Tensor:
        """Join the replicas' gradients, averaged over all ranks' batches.

        Every rank must call it.

        Args:
            scale: the factor of the losses (fp16's loss scale).

        Returns:
            [] fp32, the L2 norm over all rows of all tables on all ranks.
        """
        # fp64 on the host: squares of millions of rows are added one chunk at a time.
        squares = torch.zeros((), dtype=torch.float64)
        world_size, _ = _size_and_rank(self.groups.everyone)
        for name, table in self.tables.items():
            assert table.collected is not None
            if name in self.frozen:
                table.collected = []
                continue
            factors = _joined(table.collected, table.weight)
            table.collected = []
            if self.groups.replicas is not None:
                # Pairs are exchanged, not gradients: the gathered size follows the tokens, not the
                # table.
                factors = _joined(_gathered(factors, self.groups.replicas), table.weight)
            state = self.states[name]
            # Each replica reduces and updates its own part of the rows, as in ZeRO stage 1.
            mine_P = (factors.row_P >= state.first) & (factors.row_P < state.last)
            c_P = factors.c_P[mine_P] / (scale * world_size)
            by_row = SortedFactors(
                Factors(factors.row_P[mine_P], factors.owner_P[mine_P], c_P, factors.x_TD),
                self.kernel,
            )
            self._reduced[name] = by_row
            # The norm needs every row's gradient once now; step() computes them again, because all
            # of them together may not fit into memory.
            for rows in _chunks(by_row.row_U.numel()):
                squares += torch.linalg.vector_norm(by_row.gradient(rows)).double().square().cpu()
        squares = squares.to(next(iter(self.states.values())).table_ND.device)
        # Each row is reduced by one replica, so no square is counted twice.
        if self.groups.everyone is not None:
            distributed.all_reduce(squares, group=self.groups.everyone)
        return squares.sqrt().float()

    @torch.no_grad()
    def step(self, learning_rate: float, factor: float) -> None:
        """Update the rows that were used, by ``factor`` times their gradient (clipping)."""
        for name, by_row in self._reduced.items():
            state = self.states[name]
            for rows in _chunks(by_row.row_U.numel()):
                state.update(by_row.row_U[rows], by_row.gradient(rows) * factor, learning_rate)
            # In the order of the tables, which is the same on all ranks: these are collectives.
            if self.groups.replicas is not None:
                _share_rows(state.table_ND, by_row.row_U, self.groups.replicas)
        self.discard()

    def discard(self) -> None:
        """Forget the reduced gradients: the step is skipped."""
        self._reduced = {}

    def is_finite(self) -> bool:
        """Whether all weights on this rank are finite: their sum is not if one of them is not."""
        return all(bool(state.table_ND.sum().isfinite()) for state in self.states.values())


def _chunks(rows: int) -> list[slice]:
    return [slice(first, min(first + CHUNK_ROWS, rows)) for first in range(0, rows, CHUNK_ROWS)]


def _size_and_rank(group: distributed.ProcessGroup | None) -> tuple[int, int]:
    return (
        (1, 0)
        if group is None
        else (distributed.get_world_size(group), distributed.get_rank(group))
    )


def _joined(parts: list[Factors], weight: torch.Tensor) -> Factors:
    """The factors of several batches as one, in order."""
    if not parts:
        # No forward pass used this table: shapes and dtypes stay valid for the collectives.
        empty = torch.zeros(0, dtype=torch.int64, device=weight.device)
        return Factors(empty, empty, weight.new_zeros(0), weight.new_zeros(1, weight.shape[-1]))
    firsts = [0]
    for part in parts:
        firsts.append(firsts[-1] + part.x_TD.shape[0])
    # Owners index the tokens of their own batch. ``firsts`` has one element more than ``parts``.
    owners = [part.owner_P + first for part, first in zip(parts, firsts, strict=False)]
    return Factors(
        *(
            torch.cat(tensors)
            for tensors in (
                [p.row_P for p in parts],
                owners,
                [p.c_P for p in parts],
                [p.x_TD for p in parts],
            )
        )
    )


def _gathered(factors: Factors, group: distributed.ProcessGroup) -> list[Factors]:
    """The factors of every replica, in rank order."""
    columns = [_gather_ragged(tensor, group) for tensor in factors]
    return [Factors(*parts) for parts in zip(*columns, strict=True)]


def _gather_ragged(tensor: torch.Tensor, group: distributed.ProcessGroup) -> list[torch.Tensor]:
    """The tensor of every rank, whose first dimensions may differ."""
    world_size = distributed.get_world_size(group)
    counts = torch.empty(world_size, dtype=torch.int64, device=tensor.device)
    distributed.all_gather_into_tensor(
        counts, torch.tensor([tensor.shape[0]], device=tensor.device), group=group
    )
    # all_gather wants equal shapes: shorter ones are padded, and cut again below.
    largest = int(counts.max())
    padded = tensor.new_zeros(largest, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    everything = tensor.new_empty(world_size * largest, *tensor.shape[1:])
    distributed.all_gather_into_tensor(everything, padded, group=group)
    return [
        part[:count]
        for part, count in zip(
            everything.split(largest) if largest else [everything] * world_size,
            counts.tolist(),
            strict=True,
        )
    ]


def _share_rows(
    table_ND: torch.Tensor, row_U: torch.Tensor, group: distributed.ProcessGroup
) -> None:
    """Send the rows that this rank has updated to the other replicas, and receive theirs."""
    for rows, values in zip(
        _gather_ragged(row_U, group), _gather_ragged(table_ND[row_U], group), strict=True
    ):
        table_ND[rows] = values
