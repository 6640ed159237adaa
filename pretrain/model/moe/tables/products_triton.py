"""The products of tokens with table rows for CUDA, in Triton (Tillet et al. 2019).

Each chosen row is read once and never copied. Products: one program per few pairs, whatever bags
they belong to. Weighted sums: one program per bag; a bag of more than ``PIECE`` pairs is cut, and a
second kernel adds the sums of its further pieces to that of the first, in order. Nothing is added
atomically, so a result depends on its bag alone and is the same each time. Addresses are 64 bits
wide: a table may have more than 2^31 elements.

Raises:
    ConfigError: if Triton is not installed.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from pretrain.core.errors import ConfigError
from pretrain.model.moe.tables.interface import Bags, TableKernel

try:
    import triton
    import triton.language as tl
except ImportError:
    message = (
        "model.moe.expert_kernel needs the package triton here, which is not installed; "
        "pip install triton, or set it to bags"
    )
    raise ConfigError(message) from None

# Pairs that one program sums: a row that very many tokens chose is spread over several programs.
PIECE = 256
# Elements of a table that a program reads at once, and at most how many of them are of one row.
TILE = 4096
MOST_COLUMNS = 512


@triton.jit
def _dot_kernel(
    dot_P: tl.tensor,
    x_TD: tl.tensor,
    table_ND: tl.tensor,
    row_P: tl.tensor,
    owner_P: tl.tensor,
    num_pairs: tl.tensor,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program computes the dots of PAIRS pairs, COLUMNS elements at a time."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    is_pair = pair < num_pairs
    row = tl.load(row_P + pair, mask=is_pair, other=0)[:, None]
    owner = tl.load(owner_P + pair, mask=is_pair, other=0)[:, None]
    sums = tl.zeros((PAIRS, COLUMNS), tl.float32)
    for first in range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        is_there = is_pair[:, None] & (column < D)
        tile = tl.load(table_ND + row * D + column, mask=is_there, other=0.0)
        sums += tile * tl.load(x_TD + owner * D + column, mask=is_there, other=0.0)
    tl.store(dot_P + pair, tl.sum(sums, axis=1), mask=is_pair)


@triton.jit
def _piece_kernel(
    y_TD: tl.tensor,
    further_ED: tl.tensor,
    c_P: tl.tensor,
    table_ND: tl.tensor,
    row_P: tl.tensor,
    offsets_T1: tl.tensor,
    bag_E: tl.tensor,
    further_T1: tl.tensor,
    num_bags: tl.tensor,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Sum one piece of a bag: first pieces into ``y_TD``, further ones into ``further_ED``.

    A piece that starts after its bag's end is zero.
    """
    piece = tl.program_id(0).to(tl.int64)
    # piece - piece is a zero of piece's type: Triton requires one type on both paths of the if.
    bag = piece
    number = piece - piece
    target_D = y_TD + piece * D
    if piece >= num_bags:
        further = piece - num_bags
        bag = tl.load(bag_E + further)
        number = further - tl.load(further_T1 + bag) + 1
        target_D = further_ED + further * D
    start = tl.load(offsets_T1 + bag) + number * PIECE
    stop = tl.minimum(start + PIECE, tl.load(offsets_T1 + bag + 1))
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((PAIRS, COLUMNS), tl.float32)
    for first in range(start, stop, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        is_pair = pair < stop
        row = tl.load(row_P + pair, mask=is_pair, other=0)
        c = tl.load(c_P + pair, mask=is_pair, other=0.0)
        is_there = is_pair[:, None] & (column < D)[None, :]
        sums += c[:, None] * tl.load(
            table_ND + row[:, None] * D + column[None, :], mask=is_there, other=0.0
        )
    tl.store(target_D + column, tl.sum(sums, axis=0), mask=column < D)


@triton.jit
def _join_kernel(
    y_TD: tl.tensor,
    further_ED: tl.tensor,
    bag_E: tl.tensor,
    further_T1: tl.tensor,
    D: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Add a bag's further pieces to its first; the program of the first further piece does it."""
    further = tl.program_id(0).to(tl.int64)
    bag = tl.load(bag_E + further)
    if further == tl.load(further_T1 + bag):
        stop = tl.load(further_T1 + bag + 1)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros((PIECES, COLUMNS), tl.float32)
        for first in range(further, stop, PIECES):
            piece = first + tl.arange(0, PIECES)
            is_there = (piece < stop)[:, None] & (column < D)[None, :]
            sums += tl.load(
                further_ED + piece[:, None] * D + column[None, :], mask=is_there, other=0.0
            )
        target = y_TD + bag * D + column
        tl.store(target, tl.load(target, mask=column < D) + tl.sum(sums, axis=0), mask=column < D)


def _tile(D: int) -> tuple[int, int]:
    """Rows and columns that a program reads at once, both powers of two."""
    columns = min(max(triton.next_power_of_2(D), 32), MOST_COLUMNS)
    return TILE // columns, columns


def _ready(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors, contiguous as the kernels' addresses assume.

    Raises:
        ConfigError: on a device that Triton cannot compile for.
    """
    if not tensors[0].is_cuda and not triton.knobs.runtime.interpret:
        raise ConfigError(
            "model.moe.expert_kernel=triton needs CUDA, but the model runs on "
            f"{tensors[0].device.type}; set it to auto or bags"
        )
    return [tensor.contiguous() for tensor in tensors]


def _row_dots(x_TD: torch.Tensor, table_ND: torch.Tensor, bags: Bags) -> torch.Tensor:
    x_TD, table_ND, row_P, owner_P = _ready(x_TD, table_ND, bags.row_P, bags.owners())
    dot_P = x_TD.new_empty(row_P.numel())
    if dot_P.numel():
        pairs, columns = _tile(table_ND.shape[1])
        grid = (triton.cdiv(dot_P.numel(), pairs),)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(x_TD):
            _dot_kernel[grid](
                dot_P,
                x_TD,
                table_ND,
                row_P,
                owner_P,
                dot_P.numel(),
                table_ND.shape[1],
                pairs,
                columns,
            )
    return dot_P


def _weighted_rows(c_P: torch.Tensor, table_ND: torch.Tensor, bags: Bags) -> torch.Tensor:
    c_P, table_ND, row_P, offsets_T1 = _ready(c_P, table_ND, *bags)
    T, D = offsets_T1.numel() - 1, table_ND.shape[1]
    y_TD = table_ND.new_empty(T, D)
    if T == 0:
        return y_TD
    # An upper bound of the further pieces that needs no synchronisation with the device; surplus
    # programs sum nothing.
    most = row_P.numel() // PIECE
    further_T1 = functional.pad(((offsets_T1.diff() - 1).clamp_min(0) // PIECE).cumsum(0), (1, 0))
    bag_E = torch.searchsorted(
        further_T1[1:], torch.arange(most, device=row_P.device), right=True
    ).clamp_max(T - 1)
    further_ED = table_ND.new_empty(most, D)
    pairs, columns = _tile(D)
    with torch.cuda.device_of(table_ND):
        # The first pieces of all T bags, then the further ones.
        grid = (T + most, triton.cdiv(D, columns))
        _piece_kernel[grid](
            y_TD,
            further_ED,
            c_P,
            table_ND,
            row_P,
            offsets_T1,
            bag_E,
            further_T1,
            T,
            D,
            PIECE,
            pairs,
            columns,
        )
        if most:
            _join_kernel[most, triton.cdiv(D, columns)](
                y_TD, further_ED, bag_E, further_T1, D, pairs, columns
            )
    return y_TD


TRITON = TableKernel(_row_dots, _weighted_rows)
