"""Gives a model without values its weights: each rank computes and keeps its own part alone.

At ZeRO stages 0 to 2 that is every parameter (of experts those of this rank), in the dtype and on
the device that it trains with; at stage 3 this rank's part of each one. What a rank holds at a time
on top of that is one whole parameter in the dtype of training, of which it writes its own part
only, and one fp32 tensor that a random stream or a file has.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import distributed, nn

from pretrain.core.progress import Stage
from pretrain.engine.workarounds.partitioned_start import PartitionedStart
from pretrain.model.decoder import DecoderLM
from pretrain.model.deferred import places_of
from pretrain.model.init import Piece, RangeReader, initial_pieces, write_pieces
from pretrain.model.moe.tables.products import ExpertTable
from pretrain.model.tensor_shards import part_of, shard_of

# Those that take seconds to draw: a core draws about 20 million a second.
SHOWN_ELEMENTS = 100_000_000


@torch.no_grad()
def place_weights(
    model: DecoderLM,
    seed: int,
    stored: Mapping[str, RangeReader],
    dtype: torch.dtype,
    device: torch.device,
    partitions: PartitionedStart | None,
) -> None:
    """Replace the parameters of ``model`` by real ones with their initial values.

    Args:
        model: built by :func:`pretrain.model.deferred.without_values`.
        stored: readers of those parameters and buffers that do not start from random values.
        dtype: of all parameters but tables of experts, which are fp32.
        partitions: of ZeRO stage 3, which tables of experts are no part of; None at other stages.
    """
    places = places_of(model)
    tables = {id(table.weight) for table in model.modules() if isinstance(table, ExpertTable)}
    # A list: the model's parameters change below.
    every = list(initial_pieces(model, seed))
    size = sum(shaped.numel() for _, shaped, _ in every)
    is_main = not distributed.is_initialized() or distributed.get_rank() == 0
    with Stage("initial weights", is_main and size > SHOWN_ELEMENTS, size, "parameter") as stage:
        for name, shaped, initial in every:
            pieces = initial
            if name in stored:
                read, shard = stored[name], shard_of(shaped)
                if shard is not None:
                    read = part_of(read, shaped.shape, shard)
                pieces = [Piece(0, shaped.numel(), read)]
            is_table = id(shaped) in tables
            number_format = torch.float32 if is_table else dtype
            # No other name for the memory: it is free once DeepSpeed has taken a part of it.
            parameter = nn.Parameter(
                torch.empty(shaped.shape, dtype=number_format, device=device), shaped.requires_grad
            )
            parameter.__dict__.update(shaped.__dict__)
            for module, attribute in places[id(shaped)]:
                module._parameters[attribute] = parameter
            _fill(parameter, pieces, None if is_table else partitions)
            stage.advance(shaped.numel())
    _place_buffers(model, stored, device)


def _fill(
    parameter: nn.Parameter, pieces: list[Piece], partitions: PartitionedStart | None
) -> None:
    """Give a parameter its values; of those that are partitioned, this rank's part."""
    flat_N = parameter.detach().view(-1)
    if partitions is None:
        write_pieces(flat_N, 0, flat_N.numel(), pieces)
        return
    # Memory that nothing writes is not taken: of the whole parameter, its own part is.
    first, last = partitions.own_range(parameter)
    write_pieces(flat_N[first:last], first, last, pieces)
    del flat_N
    partitions.keep_own_part(parameter)


def _place_buffers(
    model: DecoderLM, stored: Mapping[str, RangeReader], device: torch.device
) -> None:
    """Move buffers to the device, where DeepSpeed does not at stage 3, and read stored ones."""
    for name, buffer in model.named_buffers():
        if name in stored:
            buffer.copy_(stored[name](0, buffer.numel()).view(buffer.shape))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
