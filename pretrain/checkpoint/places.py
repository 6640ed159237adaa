"""Where a rank's part of the engine's state belongs in the state of the whole model.

A checkpoint knows nothing of ranks. A tensor of it has the name and shape that it has in a model
that holds all experts (ep_size 1): an expert that has a name of its own is numbered over all ranks,
and stacked experts are rows of one tensor. A rank holds flat ranges of these tensors.
"""

from __future__ import annotations

from collections import defaultdict
from math import prod
from typing import NamedTuple

from torch import Tensor, nn

from pretrain.checkpoint.tensor_headers import Columns, Range
from pretrain.checkpoint.weights import global_name, is_expert
from pretrain.engine.engine import Engine
from pretrain.engine.fragments import Fragment, fragments, whole_shape
from pretrain.model.tensor_shards import shard_of


class Place(NamedTuple):
    """Of a rank's parameter in the whole model.

    Attributes:
        shape: of the whole tensor.
        offset: the parameter's first element in it, or in the columns.
        columns: of the whole tensor that the parameter is; None for all.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    columns: Columns | None = None


class Piece(NamedTuple):
    """A fragment of this rank, with its range in the whole tensor ``name``."""

    name: str
    range: Range
    fragment: Fragment

    @property
    def stop(self) -> int:
        """The element after its last one."""
        return self.range.start + self.elements

    @property
    def elements(self) -> int:
        """Their number."""
        return self.fragment.master.numel()


def place_of(name: str, parameter: nn.Parameter, engine: Engine) -> Place:
    """Return where a parameter of this rank's model belongs."""
    shape = whole_shape(parameter)
    model = engine.model.config
    if (shard := shard_of(parameter)) is not None:
        dim, part, parts = shard
        whole = (*shape[:dim], shape[dim] * parts, *shape[dim + 1 :])
        if dim == 0:
            return Place(name, whole, part * prod(shape))
        return Place(name, whole, 0, Columns(part * shape[dim], shape[dim]))
    if not is_expert(parameter) or global_name(name, 1, model) != name:
        # Dense, or one expert under its own name: whole on this rank.
        return Place(global_name(name, first_expert(engine), model), shape, 0)
    rows = engine.expert_parts * shape[0]
    return Place(name, (rows, *shape[1:]), engine.expert_part * prod(shape))


def first_expert(engine: Engine) -> int:
    """Return the number over all ranks of this rank's first expert."""
    return engine.expert_part * (engine.recipe.model.total_experts // engine.expert_parts)


def pieces(engine: Engine) -> list[Piece]:
    """Return all that this rank's optimizer trains, except expert tables."""
    places = {
        id(parameter): place_of(name, parameter, engine)
        for name, parameter in engine.model.named_parameters()
    }
    found = []
    for fragment in fragments(engine.optimizer, engine.zero_stage, engine.precision):
        name, shape, offset, columns = places[id(fragment.parameter)]
        found.append(Piece(name, Range(offset + fragment.start, shape, columns), fragment))
    return found


def own_pieces(engine: Engine) -> list[Piece]:
    """Return the pieces that this rank writes: of equal ones on several ranks, one rank's.

    Only at ZeRO 0 do ranks hold equal pieces; they share the work evenly.
    """
    mine = pieces(engine)
    if engine.zero_stage > 0:
        return mine
    rank, world_size = engine.topology.rank, engine.topology.world_size
    # Ranks hold equal experts, or equal shards, if they have the same part of them.
    by_parts: dict[tuple[bool, int], list[Piece]] = defaultdict(list)
    for piece in mine:
        parameter = piece.fragment.parameter
        shard = shard_of(parameter)
        parts = engine.expert_parts if is_expert(parameter) else shard.parts if shard else 1
        by_parts[is_expert(parameter), parts].append(piece)
    chosen: list[Piece] = []
    for (_, parts), group in by_parts.items():
        elements = [0] * (world_size // parts)
        for piece in group:
            writer = elements.index(min(elements))
            elements[writer] += piece.elements
            if writer == rank // parts:
                chosen.append(piece)
    return chosen


class TablePiece(NamedTuple):
    """The rows of an expert table that this rank's sparse optimizer updates.

    Attributes:
        first_row: in the whole table, [experts * width, D].
        rows: [N, D] fp32, a view.
    """

    name: str
    shape: tuple[int, ...]
    first_row: int
    rows: Tensor

    @property
    def range(self) -> Range:
        """Of the rows, flat, in the whole tensor."""
        return Range(self.first_row * self.rows.shape[1], self.shape)


def table_pieces(engine: Engine, whole: bool = False) -> list[TablePiece]:
    """Return this rank's rows of each expert table; empty without tables.

    Args:
        whole: all rows that are on this rank, also those that another replica updates.
    """
    sparse = engine.sparse_optimizer
    if sparse is None:
        return []
    found = []
    for name, table in sparse.tables.items():
        experts, width, columns = table.weight.shape
        state = sparse.states[name]
        first, last = (0, experts * width) if whole else (state.first, state.last)
        shape = (experts * engine.expert_parts, width, columns)
        before = engine.expert_part * experts * width
        found.append(TablePiece(name, shape, before + first, state.table_ND[first:last]))
    return found


def buffers(engine: Engine) -> dict[str, Tensor]:
    """Return the buffers that a checkpoint holds, such as the routers' balancing biases."""
    persistent = engine.model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in engine.model.named_buffers() if name in persistent}
