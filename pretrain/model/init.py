"""Initialisation: each parameter has its own random stream, seeded by its name.

An expert's stream is named by its global index. So a model does not depend on rank, world size,
ep_size, MoE kind or the order of construction. Matrices and embeddings are normal with
``initializer_range``; projections that write into the residual stream (attention output, expert and
feed-forward down) get ``initializer_range / sqrt(2 * num_hidden_layers)`` (Radford et al. 2019);
norms are one; biases, attention sinks and the tensors named by the MoE kind are zero. A parameter
that :func:`keep_initial_value` marked keeps what its module gave it. Last, the rules of
:mod:`pretrain.model.mup` scale a model that is wider than its base.

Values are computed tensor by tensor, and those of stacked experts expert by expert, so that a rank
which keeps a part of a model never holds the whole (:mod:`pretrain.engine.placement`). A stream
cannot be entered in the middle: torch's generator for CPUs has to draw what comes before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from pretrain.core.errors import ConfigError
from pretrain.core.seeds import derived_seed
from pretrain.model.config import ModelConfig, below_feed_forward
from pretrain.model.decoder import DecoderLM
from pretrain.model.moe.base import MoELayer, Stream, whole_stream
from pretrain.model.mup import mark_learning_rates, scale_of, width_scales
from pretrain.model.tensor_shards import RangeReader, part_of, shard_of, whole_shape

# Suffixes of parameter names.
RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")
ZERO = (".bias", ".sinks")


def keep_initial_value(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter of a part that is added: what it holds now is its initial value."""
    parameter.keeps_initial_value = True  # type: ignore[attr-defined]
    return parameter


class Piece(NamedTuple):
    """Neighbouring elements of a parameter, and how to compute any range of them.

    Attributes:
        start, stop: in the parameter, flat and in row-major order; ``stop`` is excluded.
        values: fp32 on the CPU, counted from ``start`` on.
    """

    start: int
    stop: int
    values: RangeReader


@torch.no_grad()
def initialize(model: DecoderLM, seed: int) -> None:
    """Fill every parameter of ``model`` in place."""
    for _, parameter, pieces in initial_pieces(model, seed):
        write_pieces(parameter.view(-1), 0, parameter.numel(), pieces)


def initial_pieces(model: DecoderLM, seed: int) -> Iterator[tuple[str, nn.Parameter, list[Piece]]]:
    """Yield each parameter's name, itself and its initial values, in the model's order.

    Nothing is drawn before a piece's values are asked for. Parameters may be on the meta device;
    those that keep their initial value are not, and have it as their only piece.
    """
    config = model.config
    scales = width_scales(config)
    mark_learning_rates(model, scales)
    # A rank holds a part of the experts, under local indices that say nothing.
    of_experts = {
        id(parameter): streams
        for name, module in model.named_modules()
        if isinstance(module, MoELayer)
        for parameter, streams in module.expert_streams(name)
    }
    for name, parameter in model.named_parameters():
        factor = scale_of(name, config, scales).size
        if getattr(parameter, "keeps_initial_value", False):
            if parameter.is_meta:
                raise ConfigError(
                    f"the value of '{name}' is lost: give the parameter to keep_initial_value "
                    "before it is assigned to its module"
                )
            own = parameter.detach().float().view(-1) * factor
            yield name, parameter, [Piece(0, own.numel(), partial(_range_of, own))]
            continue
        shard = shard_of(parameter)
        shape = parameter.shape if shard is None else whole_shape(parameter.shape, shard)
        streams = of_experts.get(id(parameter)) or [whole_stream(name, shape)]
        is_norm = id(parameter) not in of_experts and name.endswith("norm.weight")
        pieces = [_piece_of(stream, config, seed, factor, is_norm) for stream in streams]
        if shard is not None:
            values = part_of(pieces[0].values, parameter.shape, shard)
            pieces = [Piece(0, parameter.numel(), values)]
        yield name, parameter, pieces


def write_pieces(flat_N: torch.Tensor, first: int, last: int, pieces: list[Piece]) -> None:
    """Write the elements ``first`` to ``last`` (excluded) of a parameter, cast to its dtype.

    Args:
        flat_N: these elements.
        pieces: of the whole parameter. What no such element is in is not computed.
    """
    for piece in pieces:
        start, stop = max(first, piece.start), min(last, piece.stop)
        if start < stop:
            values = piece.values(start - piece.start, stop - piece.start)
            flat_N[start - first : stop - first].copy_(values)


def _piece_of(
    stream: Stream, config: ModelConfig, seed: int, factor: float, is_norm: bool
) -> Piece:
    """The elements that a parameter takes of a stream, times ``factor``."""
    size = stream.last - stream.first

    def values(start: int, stop: int) -> torch.Tensor:
        if is_norm:
            return torch.full((stop - start,), factor)
        if _starts_at_zero(stream.name, config):
            return torch.zeros(stop - start)
        drawn = _normal(stream, config, seed).view(-1)[stream.first + start : stream.first + stop]
        return drawn if factor == 1.0 else drawn.mul_(factor)

    return Piece(stream.start, stream.start + size, values)


def _normal(stream: Stream, config: ModelConfig, seed: int) -> torch.Tensor:
    """N(0, std^2), drawn in fp32 on the CPU: every device gets the same values."""
    name = stream.name
    std = config.initializer_range
    if name.endswith(RESIDUAL_PROJECTIONS):
        std /= math.sqrt(2 * config.num_hidden_layers)
    inner = below_feed_forward(name)
    if config.moe is not None and inner is not None:
        std = config.moe.initial_std(inner, stream.shape[-1]) or std
        # One name for what every kind of layer has, such as a router: they then start equal.
        name = name.removesuffix(inner) + config.moe.common_name(inner)
    generator = torch.Generator().manual_seed(derived_seed(f"{seed}/{name}"))
    empty = torch.empty(stream.shape, dtype=torch.float32, device="cpu")
    return empty.normal_(0.0, std, generator=generator)


def _range_of(flat_N: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return flat_N[start:stop]


def _starts_at_zero(name: str, config: ModelConfig) -> bool:
    inner = below_feed_forward(name)
    in_moe = config.moe is not None and inner is not None and config.moe.starts_at_zero(inner)
    return in_moe or name.endswith(ZERO)
