"""Whole matrices out of flat partitions that ranks share, and back: ZeRO cuts parameters anywhere, Muon needs them whole.

Each matrix has one owner among the ranks that hold a part of it. The parts go there, the owner computes once, and the parts of the result go
back: two exchanges in which a rank sends no more numbers than its partition has. At ZeRO 1 and 2 nearly every matrix lies whole in one
partition and stays where it is. After Liu et al. 2025 ("Muon is scalable", algorithm 1), where every rank that holds a part computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import distributed


class ShardedMatrix(NamedTuple):
    """One matrix of ``rows x columns`` numbers in row order.

    Attributes:
        bounds: rank r of the group holds the numbers from ``bounds[r]`` to ``bounds[r + 1]``.
        offset: where this rank's part begins in its partition.
    """

    rows: int
    columns: int
    bounds: tuple[int, ...]
    offset: int

    def held_by(self, rank: int) -> int:
        return self.bounds[rank + 1] - self.bounds[rank]


def cut_matrices(shape: torch.Size, start: int, partition_size: int, ranks: int, rank: int, offset: int) -> list[ShardedMatrix]:
    """The matrices of a parameter [..., A, B] that stands at ``start`` of numbers of which each rank has ``partition_size`` in turn.

    Args:
        offset: where this rank's share of those numbers begins in its partition.
    """
    rows, columns = shape[-2:]
    found = []
    for first in range(start, start + shape.numel(), rows * columns):
        bounds = tuple(min(max(number * partition_size - first, 0), rows * columns) for number in range(ranks)) + (rows * columns,)
        found.append(ShardedMatrix(rows, columns, bounds, offset + max(first - rank * partition_size, 0)))
    return found


def choose_owners(matrices: Iterable[ShardedMatrix], ranks: int) -> list[int]:
    """For each matrix the least busy of the ranks that hold a part of it, the same on every rank."""
    busy, owners = [0] * ranks, []
    for matrix in matrices:
        owner = min((rank for rank in range(ranks) if matrix.held_by(rank)), key=lambda rank: busy[rank])
        busy[owner] += matrix.rows * matrix.columns * min(matrix.rows, matrix.columns)
        owners.append(owner)
    return owners


class MatrixShards:
    """The matrices of one flat partition.

    Args:
        group: the ranks that share them; None for this process alone.
        device: where matrices are exchanged and computed: the process group's, also where the optimizer's state is kept on the host.
    """

    def __init__(self, matrices: list[ShardedMatrix], group: distributed.ProcessGroup | None, device: torch.device) -> None:
        self.group, self.device = group, device
        self.ranks, self.rank = (1, 0) if group is None else (distributed.get_world_size(group), distributed.get_rank(group))
        owners = choose_owners(matrices, self.ranks)
        self.owned_by = [[matrix for matrix, owner in zip(matrices, owners, strict=True) if owner == rank] for rank in range(self.ranks)]

    def transform(self, flat_N: torch.Tensor, dtype: torch.dtype, change: Callable[[Iterable[torch.Tensor]], list[torch.Tensor]]) -> torch.Tensor:
        """``change`` of the whole matrices, as far as this rank's partition holds them; zeros where no matrix is.

        Args:
            flat_N: this rank's partition.
            dtype: of the matrices on their way and in ``change``, which gets those that this rank owns.

        Returns:
            [N] in the dtype and on the device of ``flat_N``.
        """
        mine = self.owned_by[self.rank]
        parts = [self._own_part(flat_N, matrix).to(self.device, dtype) for matrices in self.owned_by for matrix in matrices]
        away = [sum(matrix.held_by(self.rank) for matrix in matrices) for matrices in self.owned_by]
        here = [sum(matrix.held_by(rank) for matrix in mine) for rank in range(self.ranks)]
        arrived = self._exchange(parts, away, here, dtype)
        sizes = [[matrix.held_by(rank) for matrix in mine] for rank in range(self.ranks)]
        by_rank = [part.split(of_rank) for part, of_rank in zip(arrived.split(here), sizes, strict=True)]
        whole = [torch.cat(pieces).view(matrix.rows, matrix.columns) for matrix, pieces in zip(mine, zip(*by_rank, strict=True), strict=True)]
        changed = [result.reshape(-1) for result in change(whole)]
        shares = [(rank, matrix, result) for rank in range(self.ranks) for matrix, result in zip(mine, changed, strict=True)]
        back = [result[matrix.bounds[rank] : matrix.bounds[rank + 1]] for rank, matrix, result in shares]
        returned = self._exchange(back, here, away, dtype)
        result_N, position = torch.zeros_like(flat_N), 0
        for matrix in (matrix for matrices in self.owned_by for matrix in matrices):
            held = matrix.held_by(self.rank)
            self._own_part(result_N, matrix).copy_(returned[position : position + held])
            position += held
        return result_N

    def _own_part(self, flat_N: torch.Tensor, matrix: ShardedMatrix) -> torch.Tensor:
        return flat_N[matrix.offset : matrix.offset + matrix.held_by(self.rank)]

    def _exchange(self, parts: list[torch.Tensor], sent: list[int], received: list[int], dtype: torch.dtype) -> torch.Tensor:
        """``sent`` numbers to each rank in turn for ``received`` from each."""
        joined = torch.cat(parts) if parts else torch.zeros(0, dtype=dtype, device=self.device)
        if self.group is None:
            return joined
        arrived = joined.new_empty(sum(received))
        distributed.all_to_all_single(arrived, joined, received, sent, group=self.group)
        return arrived
