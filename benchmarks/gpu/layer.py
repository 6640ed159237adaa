"""One MoE layer, forward and backward: ours, dense, transformers' and DeepSpeed's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers.layers import Dense, Shape, build_layer
from peers.measure import fast_format
from torch import nn

from gpu.models import recipe_of
from gpu.timing import Bench, timed
from pretrain.core.files import JsonObject
from pretrain.engine.precision import DTYPES
from pretrain.model.kernels.selection import Mode, set_fused_kernels
from pretrain.model.sizes import peak_flops

TOKENS = 16_384
TINY = 256
# Side -> how its layer is built, and whether fused kernels compute.
SIDES: dict[str, tuple[Callable[[Shape], nn.Module], Mode]] = {
    "ours": (lambda shape: build_layer(shape, "dropless"), "auto"),
    "ours, no fused kernels": (lambda shape: build_layer(shape, "dropless"), "none"),
    "dense of equal active FLOPs": (Dense, "auto"),
    "transformers": (lambda shape: build_layer(shape, "transformers"), "auto"),
    "DeepSpeed native": (lambda shape: build_layer(shape, "deepspeed"), "auto"),
}


def shape_of(model: str, quick: bool) -> Shape:
    """The layer of one of ``gpu.models.MODELS``."""
    config = recipe_of(model).model
    moe = config.moe
    assert moe is not None
    if quick:
        return Shape(TINY, 64, 32, moe.total_experts, moe.experts_per_token)
    return Shape(
        TOKENS,
        config.hidden_size,
        moe.moe_intermediate_size,
        moe.total_experts,
        moe.experts_per_token,
    )


def jobs() -> list[tuple[str, str]]:
    """The model and the side of each process."""
    return [(model, side) for model in ("coarse", "fine") for side in SIDES]


def measure(bench: Bench, model: str, side: str) -> dict[str, JsonObject]:
    """One side of one model's layer, by its name."""
    build, mode = SIDES[side]
    shape = shape_of(model, bench.quick)
    set_fused_kernels(mode)
    torch.manual_seed(0)
    return {side: _forward_and_backward(bench, build(shape).to(bench.device), shape)}


def _forward_and_backward(bench: Bench, layer: nn.Module, shape: Shape) -> JsonObject:
    dtype = DTYPES[fast_format()]
    size = (1, shape.tokens, shape.hidden)
    generator = torch.Generator(bench.device).manual_seed(2)
    gradient = torch.randn(size, dtype=dtype, device=bench.device, generator=generator)
    current: list[torch.Tensor] = []

    def prepare() -> None:
        x = torch.randn(size, dtype=dtype, device=bench.device, generator=generator)
        current[:] = [x.requires_grad_()]
        for parameter in layer.parameters():
            parameter.grad = None

    def call() -> None:
        output = layer(current[0])
        (output[0] if isinstance(output, tuple) else output).backward(gradient)

    found = timed(bench, call, prepare)
    peak = peak_flops(bench.device, "bf16")
    rate = shape.flops / found.seconds
    return {
        "seconds": found.seconds,
        "tflops_per_second": rate / 1e12,
        "share_of_peak": None if peak is None else rate / peak,
        "peak_bytes": found.peak_bytes,
    }
