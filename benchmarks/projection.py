#!/usr/bin/env python
"""Predicts bytes, kernels, time and MFU of MoE models on one H200. Nothing here is measured.

The work of a step is a list of operations. Each is one or more kernels, which read and write a
number of bytes in GPU memory and compute a number of FLOPs; its time is

    max(FLOPs / rate, bytes / 4.3 TB/s) + kernels * 2 us

and times add up: nothing overlaps. Assumed rates: bf16 products, grouped ones too, at 65 to 80
percent of 790 TFLOP/s, what the largest products are reported to reach of the 989 of the data
sheet; attention at 400; the router's fp32 products at 47, 70 percent of the data sheet's 67. The
memory's nominal rate is 4.8 TB/s. MFU is model FLOPs (no recomputation) over time and 989 TFLOP/s.

"plain" counts the operations that PyTorch launches for this project's code: every elementwise
operation reads and writes its tensors. "fused" assumes a kernel each for the choice of experts,
the permutation, the activation, the weighted sum, norm with rotation, the loss, and the update,
which read each input and write each output once.

A step is 4 micro batches of 16,384 tokens in sequences of 4,096, without activation checkpointing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from gpu.models import MODELS, recipe_of
from rich.console import Console
from rich.table import Table

from pretrain.core.accelerators import accelerator
from pretrain.core.cli import add_json_option, command_parser, write_json
from pretrain.core.errors import run_command
from pretrain.model.attention.config import GroupedQueryAttentionConfig
from pretrain.model.config import ModelConfig
from pretrain.model.sizes import model_size

EXAMPLES = """\
  python benchmarks/projection.py
  python benchmarks/projection.py --operations coarse
  python benchmarks/projection.py --json -"""
TOKENS, LENGTH, MICRO_BATCHES = 16_384, 4_096, 4
PEAK = accelerator("H200").bf16_flops
LARGEST_PRODUCTS = 790e12
SHARES = (0.65, 0.8)
ATTENTION_RATE = 400e12
FP32_RATE = 0.7 * accelerator("H200").fp32_flops
MEMORY_RATE = 4.3e12
LAUNCH_SECONDS = 2e-6
W = 2  # bytes of an element in bf16


@dataclass(frozen=True)
class Operation:
    """Some kernels.

    Attributes:
        unit: ``product``, ``attention`` or ``fp32``: whose rate its FLOPs have.
        model_flops: those that count for MFU; attention's backward pass computes scores again.
    """

    name: str
    flops: float
    bytes: float
    kernels: int = 1
    unit: str = "product"
    model_flops: float | None = None

    def seconds(self, share: float) -> float:
        """Time, with products at this share of their largest rate."""
        rates = {"product": LARGEST_PRODUCTS * share, "attention": ATTENTION_RATE}
        rate = rates.get(self.unit, FP32_RATE)
        return max(self.flops / rate, self.bytes / MEMORY_RATE) + self.kernels * LAUNCH_SECONDS


def moved(name: str, count: float, kernels: int = 1) -> Operation:
    """An operation that only moves bytes."""
    return Operation(name, 0.0, count, kernels)


def linear(name: str, rows: float, inner: int, outer: int, matrices: int = 1) -> list[Operation]:
    """Forward and both backward products of ``rows`` with a matrix, or grouped over several.

    Args:
        rows: of all matrices together.
        matrices: experts, each with a matrix [inner, outer].
    """
    flops = 2.0 * rows * inner * outer
    count = W * (rows * inner + rows * outer + matrices * inner * outer)
    return [Operation(f"{name}, {way}", flops, count) for way in ("y", "dx", "dw")]


def moe_layer(config: ModelConfig, tokens: int, fused: bool) -> list[Operation]:
    """An MoE layer with its residual connection, forward and backward."""
    moe = config.moe
    assert moe is not None
    width, experts, top_k = moe.moe_intermediate_size, moe.total_experts, moe.experts_per_token
    hidden = config.hidden_size
    rows = tokens * top_k
    # Elements of hidden states by token and by row, of hidden units, of router scores.
    t, r, f, e = tokens * hidden, rows * hidden, rows * width, tokens * experts
    router = [
        Operation(f"router, {way}", 2.0 * t * experts, 4 * (t + e), unit="fp32")
        for way in ("y", "dx", "dw")
    ]
    products = [
        *linear("w1", rows, hidden, width, experts),
        *linear("w3", rows, hidden, width, experts),
        *linear("w2", rows, width, hidden, experts),
    ]
    if fused:
        return [
            *router,
            moved("choice and statistics", 2 * (8 * e + 12 * rows), 4),
            moved("grouping", 24 * rows, 3),
            moved("rows of tokens", W * (t + r)),
            moved("activation", W * 3 * f),
            moved("weighted sum and residual", W * (r + 2 * t)),
            moved("weighted sum, backward", W * (2 * r + 2 * t)),
            moved("activation, backward", W * 5 * f),
            moved("sum of both gradients", W * 3 * r),
            moved("rows of tokens, backward", W * (r + 2 * t)),
            *products,
        ]
    return [
        *router,
        moved("hidden states in fp32 and back", 2 * 6 * t, 3),
        moved("choice and statistics", 2 * (10 * 4 * e + 12 * rows), 36),
        moved("grouping", 72 * rows, 8),
        moved("rows of tokens", W * 2 * r, 2),
        moved("activation", W * 5 * f, 2),
        moved("weighted sum", 14 * r + 10 * t, 4),
        moved("residual", W * 3 * t),
        moved("weighted sum, backward", 30 * r + 8 * t, 8),
        moved("activation, backward", W * 9 * f, 3),
        moved("sum of both gradients", W * 3 * r),
        moved("rows of tokens, backward", W * (3 * r + t), 2),
        moved("residual, backward", W * 3 * t),
        *products,
    ]


def dense_layer(config: ModelConfig, tokens: int, fused: bool) -> list[Operation]:
    """A dense SwiGLU with the FLOPs of the chosen experts and its residual connection."""
    moe = config.moe
    assert moe is not None
    hidden, width = config.hidden_size, moe.moe_intermediate_size * moe.experts_per_token
    f = tokens * width
    return [
        *linear("w1", tokens, hidden, width),
        *linear("w3", tokens, hidden, width),
        *linear("w2", tokens, width, hidden),
        moved("activation, both ways", W * (8 if fused else 14) * f, 2 if fused else 5),
        moved("sums", W * 9 * tokens * hidden, 3),
    ]


def attention_half(config: ModelConfig, tokens: int, fused: bool) -> list[Operation]:
    """Both norms of a block, and attention with its residual connection."""
    attention = config.attention
    assert isinstance(attention, GroupedQueryAttentionConfig)
    hidden, head = config.hidden_size, attention.head_dim
    queries, keys = attention.num_attention_heads * head, attention.num_key_value_heads * head
    t, rotated = tokens * hidden, tokens * (queries + keys)
    # Scores and values of a causal mask: query i sees i + 1 keys.
    forward = 2.0 * 2 * tokens * queries * (LENGTH + 1) / 2
    read = W * tokens * (2 * queries + 2 * keys)
    # Norms read twice and write in the backward pass. Rotation is products with cosines and sines,
    # a swap of halves and a sum.
    return [
        moved("norms", W * 2 * (2 + 3) * t, 4),
        *linear("q", tokens, hidden, queries),
        *linear("k", tokens, hidden, keys),
        *linear("v", tokens, hidden, keys),
        moved("norm and rotation", W * (2 + 4 if fused else 20) * rotated, 2 if fused else 20),
        Operation("attention, forward", forward, read, 1, "attention"),
        Operation("attention, backward", 2.5 * forward, 2 * read, 3, "attention", 2 * forward),
        *linear("o", tokens, queries, hidden),
        moved("residual", W * 2 * 3 * t, 2),
    ]


def ends(config: ModelConfig, tokens: int, fused: bool) -> list[Operation]:
    """Embedding, and the head with its loss in chunks of tokens."""
    hidden, vocabulary = config.hidden_size, config.vocab_size or 0
    chunks = -(-tokens // config.loss_chunk_tokens)
    logits = tokens * vocabulary
    return [
        moved("embedding", W * 3 * tokens * hidden, 3),
        *linear("head", tokens, hidden, vocabulary),
        moved("loss", (6 if fused else 42) * logits, (1 if fused else 12) * chunks),
    ]


def update(parameters: int, fused: bool) -> list[Operation]:
    """Norm, clipping and AdamW with fp32 weights and moments, once a step.

    Plain: gradients are copied to fp32 (6 bytes), summed up (4), scaled (8); AdamW reads 16 and
    writes 12; weights are copied back (6).
    """
    return [moved("update", (30 if fused else 52) * parameters, 2 if fused else 12)]


def micro_batch(config: ModelConfig, parameters: int, tokens: int, fused: bool) -> list[Operation]:
    """Forward and backward of one micro batch; its gradients are added to those before."""
    block = [*attention_half(config, tokens, fused), *moe_layer(config, tokens, fused)]
    return [
        *block * config.num_hidden_layers,
        *ends(config, tokens, fused),
        moved("sum of gradients", 3 * W * parameters),
    ]


def total(operations: Iterable[Operation], value: Callable[[Operation], float]) -> float:
    """A sum over operations."""
    return sum(map(value, operations))


@dataclass(frozen=True)
class Projection:
    """What is predicted of a model; pairs are at the lower and the upper rate of products.

    Attributes:
        layer_bytes, layer_kernels: of an MoE layer, forward and backward of a micro batch.
        layer_over_dense: the layer's time over that of a dense one of equal FLOPs.
    """

    model: str
    form: str
    parameters: int
    parameters_active: int
    layer_bytes: float
    layer_kernels: int
    layer_seconds: tuple[float, float]
    layer_over_dense: tuple[float, float]
    step_bytes: float
    step_kernels: int
    step_seconds: tuple[float, float]
    tokens_per_second: tuple[float, float]
    mfu: tuple[float, float]


def project(name: str, fused: bool) -> Projection:
    """Predict a model of ``benchmarks/gpu/models.py``."""
    config = recipe_of(name).model
    size = model_size(config, LENGTH)
    stored = size.parameters_stored
    layer = moe_layer(config, TOKENS, fused)
    dense = dense_layer(config, TOKENS, fused)
    step = micro_batch(config, stored, TOKENS, fused) * MICRO_BATCHES + update(stored, fused)
    tokens = TOKENS * MICRO_BATCHES

    def pair(value: Callable[[float], float]) -> tuple[float, float]:
        low, high = map(value, SHARES)
        return low, high

    layer_seconds = pair(lambda share: total(layer, lambda one: one.seconds(share)))
    dense_seconds = pair(lambda share: total(dense, lambda one: one.seconds(share)))
    seconds = pair(lambda share: total(step, lambda one: one.seconds(share)))
    return Projection(
        name,
        "fused" if fused else "plain",
        size.parameters_total,
        size.parameters_active,
        total(layer, lambda one: one.bytes),
        int(total(layer, lambda one: one.kernels)),
        layer_seconds,
        (layer_seconds[0] / dense_seconds[0], layer_seconds[1] / dense_seconds[1]),
        total(step, lambda one: one.bytes),
        int(total(step, lambda one: one.kernels)),
        seconds,
        (tokens / seconds[0], tokens / seconds[1]),
        (
            size.flops_per_token * tokens / seconds[0] / PEAK,
            size.flops_per_token * tokens / seconds[1] / PEAK,
        ),
    )


def print_tables(found: list[Projection], operations: str | None) -> None:
    """Print the models, and the operations of one model's layer."""
    console = Console(width=150)
    titles = ("model", "form", "layer GB", "kernels", "ms", "over dense")
    table = Table(*titles, "step GB", "kernels", "ms", "k tokens/s", "MFU %")
    table.title = "a projection for one H200, not measured"
    for one in found:
        layer, step = one.layer_seconds, one.step_seconds
        table.add_row(
            one.model,
            one.form,
            f"{one.layer_bytes / 1e9:.1f}",
            str(one.layer_kernels),
            _range(layer, 1e3),
            _range(one.layer_over_dense, digits=2),
            f"{one.step_bytes / 1e9:,.0f}",
            f"{one.step_kernels:,}",
            _range(step, 1e3, 0),
            _range(one.tokens_per_second, 1e-3, 0),
            _range(one.mfu, 100, 0),
        )
    console.print(table)
    if operations is None:
        return
    config = recipe_of(operations).model
    for fused in (False, True):
        table = Table("operation", "TFLOP", "GB", "kernels", "us")
        table.title = "fused" if fused else "plain"
        block = [*attention_half(config, TOKENS, fused), *moe_layer(config, TOKENS, fused)]
        for each in block:
            table.add_row(
                each.name,
                f"{each.flops / 1e12:.2f}",
                f"{each.bytes / 1e9:.2f}",
                str(each.kernels),
                f"{each.seconds(SHARES[0]) * 1e6:.0f}",
            )
        console.print(table)


def _range(pair: tuple[float, float], factor: float = 1.0, digits: int = 1) -> str:
    low, high = sorted(value * factor for value in pair)
    return f"{low:,.{digits}f}-{high:,.{digits}f}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--operations", choices=MODELS, help="list the operations of a block")
    add_json_option(parser)
    return parser.parse_args()


def main() -> None:
    """Predict all models, plain and fused."""
    options = parse_arguments()
    found = [project(name, fused) for name in MODELS for fused in (False, True)]
    if options.json_path != "-":
        print_tables(found, options.operations)
    write_json({"projection": [asdict(one) for one in found]}, options.json_path)


if __name__ == "__main__":
    run_command(main)
