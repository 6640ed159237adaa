"""Whole matrices from flat partitions that ranks share, and back.

ZeRO cuts parameters anywhere, but Muon needs whole matrices. Each matrix has one owner among the
ranks that hold a part of it. The parts are sent there, the owner computes once, and the parts of
the result are sent back: in both exchanges a rank sends at most as many elements as its partition
has. At ZeRO 1 and 2 nearly every matrix is whole in one partition and is not sent. After Liu et al.
2025 ("Muon is scalable", algorithm 1), in which every rank with a part computes the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import ClassVar, NamedTuple

import torch
from torch import distributed

# Elements that are exchanged and changed at once; a step's peak memory is a few times this.
ELEMENTS_A_BATCH = 1 << 26

# (N matrices of one shape [N, A, B], the sum of each one's marks [N]) -> the changed matrices.
Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class ShardedMatrix(NamedTuple):
    """One matrix of ``rows x columns`` elements, in row-major order, cut into flat parts.

    Attributes:
        bounds: rank r of the group holds the elements from ``bounds[r]`` to ``bounds[r + 1]``.
        offset: where this rank's part begins in its partition.
    """

    rows: int
    columns: int
    bounds: tuple[int, ...]
    offset: int

    def held_by(self, rank: int) -> int:
        """Elements that the rank holds."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def sent_by(self, rank: int) -> int:
        """Elements that the rank sends: those it holds, and a mark after them."""
        return self.held_by(rank) + 1 if self.held_by(rank) else 0

    def place_in_partition(self, rank: int) -> slice:
        """The slice of the partition with the part of this rank, ``rank``."""
        return slice(self.offset, self.offset + self.held_by(rank))


def cut_matrices(
    shape: torch.Size, *, start: int, partition_size: int, ranks: int, rank: int, offset: int
) -> list[ShardedMatrix]:
    """The matrices of a parameter [..., A, B] that starts at element ``start`` of a joined tensor.

    Each rank has ``partition_size`` elements of the joined tensor, in rank order.

    Args:
        offset: where this rank's share of the parameter begins in its partition.
    """
    rows, columns = shape[-2:]
    found = []
    # Stacked matrices [N, A, B] follow each other; each is cut at the partitions' ends on its own.
    for first in range(start, start + shape.numel(), rows * columns):
        bounds = tuple(
            min(max(number * partition_size - first, 0), rows * columns) for number in range(ranks)
        ) + (rows * columns,)
        found.append(
            ShardedMatrix(rows, columns, bounds, offset + max(first - rank * partition_size, 0))
        )
    return found


def choose_owners(matrices: Iterable[ShardedMatrix], ranks: int) -> list[int]:
    """For each matrix, the least busy of the ranks that hold a part of it.

    Deterministic, so every rank computes the same owners without communication.
    """
    busy = [0] * ranks
    owners = []
    for matrix in matrices:
        # Only a rank with a part may own: others would receive the whole matrix for nothing.
        owner = min(
            (rank for rank in range(ranks) if matrix.held_by(rank)), key=lambda rank: busy[rank]
        )
        # The cost of Newton-Schulz iterations: A B min(A, B).
        busy[owner] += matrix.rows * matrix.columns * min(matrix.rows, matrix.columns)
        owners.append(owner)
    return owners


def same_shaped_batches(matrices: Iterable[ShardedMatrix]) -> list[list[ShardedMatrix]]:
    """Batches of matrices of one shape, each of at most ``ELEMENTS_A_BATCH`` elements.

    A single matrix with more elements is a batch.
    """
    by_shape: dict[tuple[int, int], list[ShardedMatrix]] = {}
    for matrix in matrices:
        by_shape.setdefault((matrix.rows, matrix.columns), []).append(matrix)
    batches = []
    for (rows, columns), alike in by_shape.items():
        size = max(1, ELEMENTS_A_BATCH // (rows * columns))
        batches += [alike[first : first + size] for first in range(0, len(alike), size)]
    return batches


class MatrixShards:
    """The matrices of one flat partition.

    Args:
        group: the ranks that share them; None for this process alone.
        device: on which matrices are exchanged and computed: the process group's, even if the
            optimizer's state is on the host.

    Attributes:
        rounds: the matrices in the order of exchange: in each round those that each rank owns, the
            same on every rank.
    """

    def __init__(
        self,
        matrices: list[ShardedMatrix],
        group: distributed.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.group = group
        self.device = device
        self.ranks, self.rank = (
            (1, 0)
            if group is None
            else (distributed.get_world_size(group), distributed.get_rank(group))
        )
        owners = choose_owners(matrices, self.ranks)
        owned_by = [
            [matrix for matrix, owner in zip(matrices, owners, strict=True) if owner == rank]
            for rank in range(self.ranks)
        ]
        # Padded to equal length: a rank without matrices left still takes part in the all-to-all.
        self.rounds: list[tuple[list[ShardedMatrix], ...]] = list(
            zip_longest(*map(same_shaped_batches, owned_by), fillvalue=[])
        )

    def transform(
        self,
        take: Callable[[slice], torch.Tensor],
        change: Change,
        give: Callable[[slice, torch.Tensor], object],
        dtype: torch.dtype,
    ) -> None:
        """Apply ``change`` to the whole matrices, batch by batch, which bounds the memory.

        Args:
            take: this rank's elements in a slice of its partition, and after them a mark, which is
                no element of the matrix.
            change: see :data:`Change`; in ``dtype`` on ``device``.
            give: receives the result for a slice.
        """
        for by_owner in self.rounds:
            mine = by_owner[self.rank]
            places = [
                matrix.place_in_partition(self.rank)
                for matrices in by_owner
                for matrix in matrices
                if matrix.held_by(self.rank)
            ]
            # One round: parts to the owners, the owners' work, and the results back.
            parts = [take(place).to(self.device, dtype) for place in places]
            sent = [sum(matrix.sent_by(self.rank) for matrix in matrices) for matrices in by_owner]
            received = [sum(matrix.sent_by(rank) for matrix in mine) for rank in range(self.ranks)]
            back = self._changed(
                mine, self._exchange(parts, sent, received, dtype).split(received), change
            )
            # The way back carries no marks, so its split sizes are those of held elements.
            away = [sum(matrix.held_by(rank) for matrix in mine) for rank in range(self.ranks)]
            here = [sum(matrix.held_by(self.rank) for matrix in matrices) for matrices in by_owner]
            returned = self._exchange(back, away, here, dtype)
            for place, part in zip(
                places,
                returned.split([place.stop - place.start for place in places]),
                strict=True,
            ):
                give(place, part)

    def _changed(
        self, mine: list[ShardedMatrix], by_rank: Sequence[torch.Tensor], change: Change
    ) -> list[torch.Tensor]:
        """The parts of the changed matrices, in the order of the ranks they belong to.

        Args:
            by_rank: from each rank its parts of the matrices, one after the other.
        """
        if not mine:
            return []
        sent = [
            numbers.split([matrix.sent_by(rank) for matrix in mine])
            for rank, numbers in enumerate(by_rank)
        ]
        of_matrices = list(zip(*sent, strict=True))
        # The last element of each part is its mark, not a weight.
        whole = torch.cat([part[:-1] for parts in of_matrices for part in parts])
        marks = torch.cat([part[-1:] for parts in of_matrices for part in parts])
        belongs_to = [
            number
            for number, matrix in enumerate(mine)
            for rank in range(self.ranks)
            if matrix.held_by(rank)
        ]
        # A matrix is untouched only if the gradients of all its parts are zero.
        marks_N = marks.new_zeros(len(mine)).index_add_(
            0, torch.tensor(belongs_to, device=self.device), marks
        )
        changed = change(whole.view(len(mine), mine[0].rows, mine[0].columns), marks_N).flatten(1)
        pairs = list(zip(mine, changed, strict=True))
        return [
            result[matrix.bounds[rank] : matrix.bounds[rank + 1]]
            for rank in range(self.ranks)
            for matrix, result in pairs
        ]

    def _exchange(
        self, parts: list[torch.Tensor], sent: list[int], received: list[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """Send ``sent`` elements to each rank, in rank order, and receive ``received`` elements."""
        joined = torch.cat(parts) if parts else torch.zeros(0, dtype=dtype, device=self.device)
        if self.group is None:
            return joined
        arrived = joined.new_empty(sum(received))
        distributed.all_to_all_single(arrived, joined, received, sent, group=self.group)
        return arrived


class MatrixOptimizer(torch.optim.Optimizer):
    """An optimizer whose update of a matrix needs all of it.

    Attributes:
        matrix_rule: the ``rule`` of the parameter groups that must be whole.
        shards: where the matrices of each flat partition are; a tensor without an entry is trained
            as it is.
    """

    matrix_rule: ClassVar[str]

    shards: dict[torch.Tensor, MatrixShards]
