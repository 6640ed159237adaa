"""The optimizer's state between an engine and the files of a checkpoint.

Names in the files are ``<parameter>/<state>``, for example ``head.weight/exp_avg``:

- a state with an element for each of the parameter's is a range of a tensor of its shape;
- a number, such as Adam's ``step``, is a tensor without dimensions: of int64 or float64 if the
  optimizer keeps a Python number, else of its own dtype;
- 8-bit states have codes under their name, the scales of the codes' blocks as
  ``<parameter>/<state>.scales@<first element>+<its place in its block>``, and the levels in each
  file as ``<state>.levels@<rank>``;
- of an expert table only rows that were ever used are stored: their numbers in the whole table as
  ``<table>/row@<first row of the writer>``, and ``steps`` and moments under such names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.checkpoint.places import Piece, own_pieces, pieces, table_pieces
from pretrain.checkpoint.quantized import (
    BLOCK,
    PADDING,
    Dequantized,
    expand,
    never_quantized,
    quantize,
)
from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.checkpoint.tensor_headers import Range
from pretrain.core.errors import CheckpointError
from pretrain.engine.engine import Engine

_SCALES = re.compile(r"^(?P<name>.*)\.scales@(?P<start>\d+)\+(?P<phase>\d+)$")
# Elements that are quantised at once.
CHUNK = 1 << 22


class Stored(NamedTuple):
    """A tensor of a file.

    Attributes:
        range: of a flat part of a larger tensor; None for a whole one.
    """

    name: str
    values: Tensor
    range: Range | None = None


def torch_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """Return the recipe's optimizer, which DeepSpeed wraps in one of its own."""
    found: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return found


def optimizer_tensors(engine: Engine) -> Iterator[Stored]:
    """Yield what this rank writes of the optimizer's state, as views where that can be.

    Raises:
        CheckpointError: for a state that is neither a number nor elementwise.
    """
    states = torch_optimizer(engine).state
    levels: dict[str, Tensor] = {}
    for piece in own_pieces(engine):
        fragment = piece.fragment
        state = states.get(fragment.trained, {})
        for key, value in state.items():
            yield from _stored(piece, key, value, state)
            if (found := _levels(state, key)) is not None:
                levels[key] = found
    for key, tensor in levels.items():
        yield Stored(f"{key}.levels@{engine.topology.rank}", tensor)
    yield from _table_rows(engine)


def _levels(state: dict[str, Any], key: str) -> Tensor | None:
    """The levels of an 8-bit state, under the names of bitsandbytes; None for other states."""
    # state1 and state2 have qmap1 and absmax1, qmap2 and absmax2.
    number = key.removeprefix("state")
    return state.get(f"qmap{number}") if key.startswith("state") else None


def _stored(piece: Piece, key: str, value: Any, state: dict[str, Any]) -> Iterator[Stored]:
    fragment = piece.fragment
    name = f"{piece.name}/{key}"
    if key.startswith(("qmap", "absmax")):
        return
    if isinstance(value, bool | int | float):
        dtype = torch.float64 if isinstance(value, float) else torch.int64
        # One number stands for the whole parameter: the rank that holds its beginning writes it.
        if piece.range.is_first:
            yield Stored(name, torch.tensor(value, dtype=dtype))
        return
    if isinstance(value, Tensor) and value.shape == fragment.trained.shape:
        place = slice(fragment.offset, fragment.offset + fragment.master.numel())
        yield Stored(name, value.view(-1)[place], piece.range)
        if _levels(state, key) is not None:
            scales = state[f"absmax{key.removeprefix('state')}"]
            blocks = slice(place.start // BLOCK, (place.stop - 1) // BLOCK + 1)
            phase = place.start % BLOCK
            yield Stored(f"{name}.scales@{piece.range.start}+{phase}", scales[blocks])
    elif isinstance(value, Tensor) and value.numel() == 1:
        if piece.range.is_first:
            yield Stored(name, value.reshape(()))
    else:
        what = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"{type(value)}"
        raise CheckpointError(
            f"the optimizer keeps '{key}' ({what}) of '{piece.name}': checkpoints hold states that "
            "are a number or have the parameter's shape, so train with another optimizer"
        )


def _table_rows(engine: Engine) -> Iterator[Stored]:
    sparse = engine.sparse_optimizer
    if sparse is None:
        return
    for table in table_pieces(engine):
        state = sparse.states[table.name]
        for key, value in state.state().items():
            # A table's state counts its rows from the first one on this rank.
            shifted = value - state.first + table.first_row if key == "row" else value
            yield Stored(f"{table.name}/{key}@{table.first_row}", shifted)


def load_optimizer(engine: Engine, reader: TensorReader) -> None:
    """Set the optimizer's state from a checkpoint of any topology.

    If parameters that one flat partition joins have other numbers of steps, the largest one holds.
    """
    stored = StoredStates(reader)
    optimizer = torch_optimizer(engine)
    by_trained: dict[int, list[Piece]] = defaultdict(list)
    for piece in pieces(engine):
        by_trained[id(piece.fragment.trained)].append(piece)
    optimizer.state.clear()
    for parts in by_trained.values():
        keys = dict.fromkeys(key for part in parts for key in stored.keys.get(part.name, ()))
        if keys:
            _fresh_state(optimizer, parts[0].fragment.trained)
        for key in keys:
            _load_key(optimizer, parts, key, stored)
    for table in table_pieces(engine):
        assert engine.sparse_optimizer is not None
        state = engine.sparse_optimizer.states[table.name]
        rows = stored.rows(table.name, table.first_row, table.first_row + table.rows.shape[0])
        rows["row"] += state.first - table.first_row
        state.load(rows)


def _fresh_state(optimizer: torch.optim.Optimizer, trained: Tensor) -> None:
    """Make the state of a tensor, if the optimizer is one of 8 bits.

    Whether that is one of codes depends on the tensor's size. Other states are made as they are
    read.
    """
    if not hasattr(optimizer, "init_state"):
        return
    # bitsandbytes looks the tensor up in its groups, and at ZeRO 3 a tensor is in one only while it
    # is being updated. All groups have the same options of quantisation.
    group = optimizer.param_groups[0]
    members, group["params"] = group["params"], [trained]
    try:
        optimizer.init_state(group, trained, 0, 0)
    finally:
        group["params"] = members


def _load_key(
    optimizer: torch.optim.Optimizer, parts: list[Piece], key: str, stored: StoredStates
) -> None:
    trained = parts[0].fragment.trained
    state = optimizer.state[trained]
    held = [part for part in parts if key in stored.keys.get(part.name, ())]
    names = [f"{part.name}/{key}" for part in held]
    form = stored.reader.form(names[0])
    if form.shape == () and held[0].range.shape != ():
        numbers = [stored.reader.read(name) for name in names]
        largest = max(numbers, key=float)
        is_python = largest.dtype in (torch.int64, torch.float64)
        # A copy for each: an optimizer counts in place.
        state[key] = largest.item() if is_python else largest.clone().to(trained.device)
        return
    levels = _levels(state, key)
    if levels is not None:
        _load_codes(state, key, parts, stored, levels)
        return
    dtype = torch.float32 if form.dtype == torch.uint8 else form.dtype
    if key not in state:
        state[key] = torch.zeros_like(trained, dtype=dtype)
    flat = state[key].view(-1)
    for part, name in zip(held, names, strict=True):
        place = slice(part.fragment.offset, part.fragment.offset + part.fragment.master.numel())
        flat[place] = stored.part(name, part).to(flat)


def _load_codes(
    state: dict[str, Any], key: str, parts: list[Piece], stored: StoredStates, levels: Tensor
) -> None:
    """Fill an 8-bit state, chunk by chunk of the tensor that the optimizer trains."""
    codes = state[key].view(-1)
    scales = state[f"absmax{key.removeprefix('state')}"]
    for first in range(0, codes.numel(), CHUNK):
        last = min(first + CHUNK, codes.numel())
        elements = Dequantized(
            torch.zeros(last - first),
            torch.zeros(last - first, dtype=torch.uint8),
            torch.full((last - first,), PADDING),
        )
        for part in parts:
            offset = part.fragment.offset
            begin = max(first, offset)
            end = min(last, offset + part.fragment.master.numel())
            name = f"{part.name}/{key}"
            if begin < end and key in stored.keys.get(part.name, ()):
                shift = part.range.start - offset
                found = stored.dequantized(name, begin + shift, end + shift)
                for target, values in zip(elements, found, strict=True):
                    target[begin - first : end - first] = values
        chunk, of_blocks = quantize(elements, levels.cpu())
        codes[first:last] = chunk.to(codes.device)
        scales[first // BLOCK : first // BLOCK + of_blocks.numel()] = of_blocks.to(scales.device)


class StoredStates:
    """The names in a checkpoint's optimizer files, sorted by what they are.

    Attributes:
        keys: the states of each parameter.
    """

    def __init__(self, reader: TensorReader) -> None:
        self.reader = reader
        self.keys: dict[str, list[str]] = defaultdict(list)
        # (first element, place in its block, name) by the state's name.
        self._scales: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        self._levels: dict[str, str] = {}
        # Names of the states by the rows' writer, by the table's name.
        self._rows: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
        for name in reader.names:
            if match := _SCALES.match(name):
                self._scales[match["name"]].append((int(match["start"]), int(match["phase"]), name))
            elif ".levels@" in name:
                self._levels[name.partition(".levels@")[0]] = name
            else:
                parameter, _, key = name.rpartition("/")
                key, _, writer = key.partition("@")
                if writer:
                    self._rows[parameter][writer][key] = name
                else:
                    self.keys[parameter].append(key)

    @property
    def tables(self) -> list[str]:
        """Names of the expert tables of which rows were used."""
        return list(self._rows)

    def dequantized(self, name: str, start: int, stop: int) -> Dequantized:
        """Return the elements ``start`` to ``stop`` of a state."""
        scales = self._scales.get(name)
        if not scales:
            return never_quantized(self.reader.read_range(name, start, stop))
        found = []
        levels = self.reader.read(self._levels[name.rpartition("/")[2]])
        phases = {first: (phase, scale) for first, phase, scale in scales}
        for share in self.reader.shares(name):
            begin, end = max(start, share.start), min(stop, share.stop)
            if begin >= end:
                continue
            phase, scale = phases[share.start]
            # The scales of the blocks from the one that ``begin`` is in.
            place = phase + begin - share.start
            codes = self.reader.read_range(name, begin, end)
            of_blocks = self.reader.read_range(
                scale, place // BLOCK, (place + end - begin - 1) // BLOCK + 1
            )
            found.append(expand(codes, of_blocks, levels, place % BLOCK))
        return Dequantized(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def part(self, name: str, piece: Piece) -> Tensor:
        """Return what belongs to a piece of this rank."""
        if name in self._scales:
            return self.dequantized(name, piece.range.start, piece.stop).values
        return self.reader.read_part(name, piece.range, piece.elements)

    def rows(self, table: str, first: int, last: int) -> dict[str, Tensor]:
        """Return the state of the used rows ``first`` to ``last`` of an expert table."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for names in self._rows.get(table, {}).values():
            # Stored in ascending order.
            rows = self.reader.read(names["row"])
            begin, end = torch.searchsorted(rows, torch.tensor([first, last])).tolist()
            for key, name in names.items():
                shape = self.reader.form(name).shape[1:]
                size = prod(shape)
                values = self.reader.read_range(name, begin * size, end * size)
                found[key].append(values.view(end - begin, *shape))
        if not found:
            return {
                "row": torch.zeros(0, dtype=torch.int64),
                "steps": torch.zeros(0, dtype=torch.int32),
            }
        joined = {key: torch.cat(parts) for key, parts in found.items()}
        # The writers' names say nothing of the order of their rows.
        order = joined["row"].argsort()
        return {key: values[order] for key, values in joined.items()}
